"""How votes become the rows of a log: the plans of certification, prediction and attack.

A plan follows from the configuration. It says what is drawn for an image (an attack draws by itself), what the image's
rows are, and how all images are summarised.
"""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from spacte.logs import certlog
from spacte.logs.certified import (
    certificate_of,
    certified,
    check_draws,
    check_voter,
    largest_radius,
    log_table,
)
from spacte.logs.certlog import elapsed
from spacte.logs.config import CERTIFIES, DESCRIBES, MAKES_ROWS, RunConfig
from spacte.logs.counts import AttackCounts, C, VoteCounts, mean_draws
from spacte.logs.description import description, parts_of
from spacte.logs.runfiles import run_name
from spacte.logs.table import markdown, render, summary_row, summary_table, table_radii
from spacte.logs.voting import Stopping
from spacte.smooth.certificates import ABSTAIN, CERTIFICATES, fewest_deciding_votes, prediction
from spacte.smooth.draws import Draws, ShouldStop
from spacte.smooth.stopping import GIVE_UP, AllVotesDecided, RadiiDecided, RadiusKnown
from spacte.utils import UserError


class Plan(Protocol[C]):
    """What makes a log's rows of the counts C of its images."""

    header: str  # of the log
    metric: str  # what the mean score is
    keeps_summary: bool  # in a file of its own
    config: RunConfig

    def from_line(self, line: str) -> C:
        """The counts of a line of a counts file."""

    def rows(self, counts: C) -> str:
        """The image's lines in the log."""

    def score(self, counts: C) -> float:
        """What the image adds to the metric."""

    def summary(self, counts: list[C], log: Path) -> str:
        """What is said of all images of the log together."""


class CertifyPlan:
    """What certification draws for an image, and what it makes of the votes.

    Raises UserError if not even unanimous votes would be a certificate.
    """

    header, metric, keeps_summary = certlog.HEADER, "ACR", True

    def __init__(self, config: RunConfig):
        self.config = config
        self.largest_radius = largest_radius(config)
        self._should_stop = stopping_rule(config)

    def draws(self, label: int) -> Draws:
        """What is drawn for an image of that label."""
        only_class = label if self.config.skip_wrong else None
        return Draws(self.config.N0, self.config.N, self.config.heads.voter, self._should_stop, only_class)

    def from_line(self, line: str) -> VoteCounts:
        """See Plan."""
        counts = VoteCounts.from_line(line)
        check_draws(counts, self.config)
        return counts

    def rows(self, counts: VoteCounts) -> str:
        """See Plan: one line."""
        predict, radius = certified(counts, self.config)
        return certlog.format_row(counts.idx, counts.label, predict, radius, counts.seconds)

    def score(self, counts: VoteCounts) -> float:
        """See Plan: its radius where it is right."""
        predict, radius = certified(counts, self.config)
        return radius if predict == counts.label else 0.0

    def summary(self, counts: list[VoteCounts], log: Path) -> str:
        """ACR and certified accuracy at the radii that N draws can reach, as markdown.

        It has a row for each certificate, both from the same votes.
        """
        radii = table_radii(self.largest_radius, self.config.dataset)[1:]
        run, known, draws = run_name(parts_of(log)[-1], configured=True), description(log), mean_draws(counts)
        rows = []
        for group, kind in enumerate(CERTIFICATES, start=1):
            config = self.config.with_certificate(certificate=kind)
            table = log_table(counts, config)
            rows.append(summary_row(replace(known, config=config), table, radii, group, run, draws))
        return render(summary_table(rows), "markdown")


class PredictPlan:
    """What prediction draws for an image, and what it makes of the votes.

    Raises UserError if not even unanimous votes would decide.
    """

    columns = ("idx", "label", "predict", "correct", "time")
    header, metric, keeps_summary = "\t".join(columns) + "\n", "accuracy", False

    def __init__(self, config: RunConfig):
        self.config = config
        _check_deciding(config)

    def draws(self, label: int) -> Draws:
        """What is drawn for an image: nothing is selected."""
        return Draws(0, self.config.N)

    def from_line(self, line: str) -> VoteCounts:
        """See Plan."""
        counts = VoteCounts.from_line(line)
        _check_sum(counts.estimation, self.config)
        return counts

    def rows(self, counts: VoteCounts) -> str:
        """See Plan: one line."""
        predict = self._predicted(counts)
        columns = (counts.idx, counts.label, predict, int(predict == counts.label), elapsed(counts.seconds))
        return "\t".join(map(str, columns)) + "\n"

    def score(self, counts: VoteCounts) -> float:
        """See Plan: 1 where the label is predicted."""
        return float(self._predicted(counts) == counts.label)

    def summary(self, counts: list[VoteCounts], log: Path) -> str:
        """Images, accuracy and abstentions, in a line."""
        table = _table(self, counts)
        abstained = (table["predict"] == ABSTAIN).mean()
        return f"{len(table)} images  accuracy {table['correct'].mean():.3f}  abstained {abstained:.3f}"

    def _predicted(self, counts: VoteCounts) -> int:
        return prediction(counts.estimation[self.config.heads.voter], self.config.level)


class AttackPlan:
    """What an attack makes of the votes on an attacked image.

    A certificate is broken where an attack within its radius gets another class predicted. An image is right under
    attack where its label is predicted, unless another class was certified: then it is wrong without an attack.
    Raises UserError if not even unanimous votes would decide.
    """

    columns = ("idx", "label", "predict", "radius", "attack_radius", "adversarial", "correct", "broken", "time")
    header, metric, keeps_summary = "\t".join(columns) + "\n", "empirical accuracy", False

    def __init__(self, config: RunConfig):
        self.config = config
        _check_deciding(config)

    def from_line(self, line: str) -> AttackCounts:
        """See Plan."""
        counts = AttackCounts.from_line(line)
        for votes in counts.votes:
            _check_sum(votes, self.config)
        return counts

    def rows(self, counts: AttackCounts) -> str:
        """See Plan: a line per radius."""
        attacks = zip(self.config.radii, self._predicted(counts), counts.norms, counts.seconds_each, strict=True)
        lines = []
        for attack_radius, adversarial, norm, took in attacks:
            inside = norm < counts.radius
            broken = inside and counts.predict != ABSTAIN and adversarial not in (counts.predict, ABSTAIN)
            certificate = (counts.idx, counts.label, counts.predict, counts.radius)
            result = (attack_radius, adversarial, int(_is_right(adversarial, counts)), int(broken), elapsed(took))
            lines.append("\t".join(map(str, certificate + result)) + "\n")
        return "".join(lines)

    def score(self, counts: AttackCounts) -> float:
        """See Plan: whether it is right at the largest radius."""
        return float(_is_right(self._predicted(counts)[-1], counts))

    def summary(self, counts: list[AttackCounts], log: Path) -> str:
        """The broken certificates by name, and the table of `accuracies`."""
        table = _table(self, counts)
        broken = [
            f"idx {row.idx}: the certificate of radius {row.radius} is broken at {row.attack_radius}\n"
            for row in table[table["broken"] == 1].itertuples()
        ]
        return "".join(broken) + markdown(accuracies(table))

    def _predicted(self, counts: AttackCounts) -> list[int]:
        return [prediction(votes[self.config.heads.voter], self.config.level) for votes in counts.votes]


_PLANS: dict[str, Any] = {"certify": CertifyPlan, "predict": PredictPlan, "attack": AttackPlan}


def plan_of(config: RunConfig, source: Path) -> Plan:
    """The plan of a run with this configuration; UserError, which names its source, if it is not that of a run."""
    wrong = config.lacks(DESCRIBES, CERTIFIES, MAKES_ROWS)
    if wrong or config.kind not in _PLANS:
        names = ", ".join(wrong or ["kind"])
        raise UserError(f"'{source}' is not the configuration of a run: {names} missing or wrong")
    return _PLANS[config.kind](config)


def accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """A row per attack radius: the images still right under attack, the certified ones, the broken certificates."""
    is_certified = (table["predict"] == table["label"]) & (table["radius"] >= table["attack_radius"])
    groups = table.assign(certified=is_certified).groupby("attack_radius")
    means = groups[["correct", "certified"]].mean().rename(columns={"correct": "empirical accuracy"})
    means = means.rename(columns={"certified": "certified accuracy"})
    return means.assign(broken=groups["broken"].sum(), images=groups.size()).reset_index()


def _table(plan: Plan[C], counts: list[C]) -> pd.DataFrame:
    """The log that a plan makes of the counts, as it is read."""
    return pd.read_csv(StringIO(plan.header + "".join(map(plan.rows, counts))), sep="\t")


def _is_right(adversarial: int, counts: AttackCounts) -> bool:
    return adversarial == counts.label and counts.predict in (counts.label, ABSTAIN)


def _check_sum(votes: np.ndarray, config: RunConfig) -> None:
    """UserError if these votes [V, K] are not those of N draws."""
    if votes[-1].sum() != config.N:
        raise UserError(f"not a vote count of this run: {votes[-1].sum()} votes, where N is {config.N}")
    check_voter(config, len(votes))


def _check_deciding(config: RunConfig) -> None:
    """UserError if N draws can never decide a prediction at the configuration's alpha."""
    n, alpha = config.N, config.alpha
    fewest = fewest_deciding_votes(config.level)
    if fewest is None:
        raise UserError(f"--alpha {alpha} is below what --exact_noise costs at --N {n}: take a larger alpha")
    if n < fewest:
        raise UserError(
            f"--N {n} at --alpha {alpha} always abstains, even where all votes agree: take at least {fewest}"
        )


def table_stopping(config: RunConfig, give_up: float = GIVE_UP) -> Stopping:
    """The default rule: an image's draws end once all radii of the table that N draws can reach are decided."""
    limit = largest_radius(replace(config, sequential=Stopping()))
    return Stopping(tuple(table_radii(limit, config.dataset).tolist()), give_up)


def stopping_rule(config: RunConfig) -> ShouldStop | None:
    """What says, from the selection and the estimation votes [K], whether estimation may end; None where N is fixed."""
    stopping, n = config.sequential, config.N
    if stopping is None:
        return None
    certificate = certificate_of(config)
    radii, give_up = stopping.radii or (), stopping.give_up or GIVE_UP
    if certificate.kind == "all-votes":
        return AllVotesDecided(certificate, n, radii, stopping.tolerance, give_up)
    if stopping.tolerance is None:
        return RadiiDecided(radii, n, certificate.alpha, config.noise_sd, give_up)
    return RadiusKnown(stopping.tolerance, n, certificate.alpha, config.noise_sd)
