"""The vote counts of a run: one JSON line an image, from which any certificate follows without a network."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from spacte.certlog import COLUMNS, format_row, round_down
from spacte.core_mhead import CertificateRule
from spacte.utils import UserError


@dataclass(frozen=True)
class Votes:
    """What was counted on one image: `selection` and `estimation` [V, K], the heads' rows and last the ensemble's.

    Each row sums to the number of draws that were used; a prediction selects nothing, its `selection` is 0.
    """

    idx: int
    label: int
    seconds: float
    selection: Tensor
    estimation: Tensor

    def to_line(self) -> str:
        """One JSON line; a voter's counts are {class: votes} without the zeros."""
        fields = {"idx": self.idx, "label": self.label, "seconds": round(self.seconds, 6)}
        fields["classes"] = self.selection.shape[1]
        for name in ("selection", "estimation"):
            fields[name] = [{k: n for k, n in enumerate(row) if n} for row in getattr(self, name).tolist()]
        return json.dumps(fields) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Votes":
        """The inverse of `to_line`. Raises UserError where the line is no vote count."""
        try:
            fields = json.loads(line)
            tables = {}
            for name in ("selection", "estimation"):
                tables[name] = torch.zeros(len(fields[name]), fields["classes"], dtype=torch.int64)
                for voter, votes in enumerate(fields[name]):
                    for k, n in votes.items():
                        tables[name][voter, int(k)] = n
            return cls(fields["idx"], fields["label"], fields["seconds"], **tables)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError("no vote count") from error


def read_votes(path: Path) -> list[Votes]:
    """Every image of a counts file, in its order. Raises UserError that names the file and the line."""
    votes = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read vote counts '{path}': {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            votes.append(Votes.from_line(line))
        except UserError as error:
            raise UserError(f"'{path}', line {number}: {error}") from error
    return votes


def voter_of(config: dict) -> int:
    """The row of the vote counts that a run's log is about: a head's, or -1, the ensemble's."""
    return -1 if config["head"] is None else config["head"]


def rule_of(config: dict) -> CertificateRule:
    """How the votes of a run with this configuration become certificates."""
    return CertificateRule(config["alpha"] - config["noise_slack"], config["noise_sd"], bool(config["sequential"]))


def certificate(votes: Votes, config: dict) -> tuple[int, float]:
    """(class, radius) of the voter that a run's configuration names; see CertificateRule for the guarantee."""
    voter = voter_of(config)
    return rule_of(config).certificate(votes.selection[voter], votes.estimation[voter])


def largest_radius(config: dict) -> float:
    """The radius of an image whose N votes all agree. UserError where not even that is a certificate."""
    n, alpha = config["N"], config["alpha"]
    radius = rule_of(config).radius(n, n)
    if radius is None:
        raise UserError(
            f"--N {n} at --alpha {alpha} can never certify: even {n} votes of {n} do not bound the probability above "
            "1/2; take a larger N or alpha"
        )
    return radius


def certificate_row(votes: Votes, config: dict) -> str:
    """An image's line in a certification log."""
    predict, radius = certificate(votes, config)
    return format_row(votes.idx, votes.label, predict, radius, votes.seconds)


def log_table(votes: list[Votes], config: dict) -> pd.DataFrame:
    """The certification log that a configuration makes of the votes, with the radii as its file would hold them."""
    rows = []
    for one in votes:
        predict, radius = certificate(one, config)
        rows.append((one.idx, one.label, predict, float(round_down(radius)), int(predict == one.label), one.seconds))
    return pd.DataFrame(rows, columns=list(COLUMNS))
