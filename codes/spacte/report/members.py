"""What the members of an ensemble, every head of every network, certify alone, and what their vote adds."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spacte.logs.certlog import certified_radius
from spacte.logs.table import radius_decimals
from spacte.report.comparable import comparable_groups, rows_of
from spacte.report.intervals import interval_over_seeds
from spacte.report.recount import counts_of, tabled
from spacte.report.run import Run

_OF_EACH = ("each ACR", "each clean")  # columns with a figure for each member


@dataclass(frozen=True)
class Members:
    """What an ensemble's vote and each of its M members certify on a log's I images, whose idx are `idx` [I].

    `vote` [I] and `alone` [M, I] are certified radii, `right` [I] and `right_alone` [M, I] whether they are correct.
    `drawn` [I] says which images' votes were counted: with --skip_wrong those that the vote's selection got right. On
    the others each member counts as wrong, as the vote does: the members' figures are then lower bounds. For the D
    drawn images, `deviation` [D] is the standard deviation over members of the label's share of votes, `variation` [D]
    the total variation distance between two members' votes, averaged over pairs; both are NaN with one member.
    """

    idx: np.ndarray
    vote: np.ndarray
    alone: np.ndarray
    right: np.ndarray
    right_alone: np.ndarray
    drawn: np.ndarray
    deviation: np.ndarray
    variation: np.ndarray

    @property
    def adds(self) -> np.ndarray:
        """The vote's radius less its members' mean on each image, [I]."""
        return self.vote - self.alone.mean(axis=0)


def members_of(run: Run) -> Members | None:
    """The members of the run's ensemble, in its norm; None, with a warning, where no counts tell.

    One head is its own member.
    """
    counts = counts_of(run, "its members are left out")
    if counts is None:
        return None
    config = run.required_config
    if config.consensus:
        text = f"'{run.path}': of a consensus' heads not all voted on every noisy copy: its members are left out"
        warnings.warn(text, stacklevel=2)
        return None
    drawn = np.array([one.estimation.any() for one in counts])
    if not drawn.any():
        warnings.warn(f"'{run.path}': no image's votes were counted: its members are left out", stacklevel=2)
        return None
    voters = len(counts[0].selection)
    single = voters == 1
    alone = [config] if single else [config.of_head(head) for head in range(voters - 1)]
    tables = [tabled(run, counts, one) for one in (config, *alone)]
    radii = np.stack([certified_radius(one) for one in tables]) * drawn
    right = np.stack([one["correct"].to_numpy(bool) for one in tables]) & drawn
    some = [one for one, is_drawn in zip(counts, drawn, strict=True) if is_drawn]
    shares = np.stack([_shares(one.estimation) for one in some], axis=1)  # [M, D, K]
    of_label = np.stack([shares[:, number, one.label] for number, one in enumerate(some)], axis=1)  # [M, D]
    pairs = [np.abs(shares[a] - shares[b]).sum(-1) / 2 for a in range(len(shares)) for b in range(a)]
    nothing = np.full(len(some), np.nan)
    deviation = nothing if single else of_label.std(axis=0, ddof=1)
    variation = nothing if single else np.mean(pairs, axis=0)
    idx = np.array([one.idx for one in counts])
    return Members(idx, radii[0], radii[1:], right[0], right[1:], drawn, deviation, variation)


def _shares(estimation: np.ndarray) -> np.ndarray:
    """The members' shares of votes for each class, [M, K], of all voters' counts."""
    rows = estimation[:-1] if len(estimation) > 1 else estimation
    return rows / rows.sum(-1, keepdims=True)


def table(runs: list[Run], over_seeds: bool = False) -> pd.DataFrame:
    """A row for each run with vote counts, or the means over each experiment's seeds. A head alone has no row.

    Columns: what the run is; images, and drawn, those whose votes were counted; ACR and clean of the vote, mean ACR and
    mean clean of its members; adds, what the vote adds to the mean ACR, with its 95 % interval low to high (over
    images, or over images and seeds); sd p, the deviation over members of the label's share of votes, and TV, the total
    variation between two members' votes, both means over the images that all ensembles certified alike have counted:
    shared; each member's ACR and clean, ascending.

    TV is a lower bound on the share of noisy copies on which two members disagree: opposite disagreements cancel in
    the counts. Both sd p and TV contain the noise of the draws, so compare them only at the same N.
    """
    every = [None if run.heads and run.heads.head is not None else members_of(run) for run in runs]
    of_run = {id(run): one for run, one in zip(runs, every, strict=True) if one is not None}
    known = [run for run in runs if id(run) in of_run]
    shared = _shared(known, [of_run[id(run)] for run in known])
    rows = []
    for name, some in rows_of(known, over_seeds):
        figures = _figures([of_run[id(run)] for run in some], radius_decimals(some[0].norm), shared[id(some[0])])
        if some[0].stopping:  # the draws ended when the vote's radii were decided, not its members'
            undecided = ["low", "high", "mean clean", *(["clean"] if not some[0].knows_radii([0.0]).all() else [])]
            figures |= dict.fromkeys(undecided, np.nan) | {_OF_EACH[1]: None}
        rows.append(some[0].facts | {"stopping": some[0].stopping} | figures | {"run": name})
    found = pd.DataFrame(rows)
    return found.astype({"shared": "Int64"}) if rows else found


def _shared(runs: list[Run], members: list[Members]) -> dict[int, np.ndarray | None]:
    """The images that every ensemble of a run's group has counted, by the run's id; None in a group without ensembles.

    With --skip_wrong each counts its own, easier ones where it certifies fewer.
    """
    groups, found = comparable_groups(runs), dict[int, np.ndarray]()
    for group, one in zip(groups, members, strict=True):
        if len(one.alone) > 1:
            counted = one.idx[one.drawn]
            found[group] = np.intersect1d(found.get(group, counted), counted)
    return {id(run): found.get(group) for run, group in zip(runs, groups, strict=True)}


def _figures(seeds: list[Members], radius_decimals: int, shared: np.ndarray | None) -> dict:
    """A row's figures: means over the seeds; sd p and TV over the `shared` images."""
    (low, high), single = _interval(seeds), len(seeds[0].alone) < 2

    def mean(figure: Callable[[Members], float]) -> float:
        return float(np.mean([figure(one) for one in seeds]))

    def mean_shared(figure: Callable[[Members], np.ndarray]) -> float:
        """The mean over the seeds of a figure [D] of the drawn images, over the shared ones; NaN without members."""
        if shared is None or not len(shared) or single:
            return np.nan
        return mean(lambda one: figure(one)[np.isin(one.idx[one.drawn], shared)].mean())

    each = [np.mean([np.sort(part(one).mean(axis=1)) for one in seeds], axis=0) for part in
            (lambda one: one.alone, lambda one: one.right_alone)]  # fmt: skip
    return {
        "images": len(seeds[0].drawn),
        "drawn": round(mean(lambda one: one.drawn.sum())),
        "ACR": mean(lambda one: one.vote.mean()),
        "mean ACR": mean(lambda one: one.alone.mean()),
        "adds": mean(lambda one: one.adds.mean()),
        "low": low,
        "high": high,
        "clean": mean(lambda one: one.right.mean()),
        "mean clean": mean(lambda one: one.right_alone.mean()),
        "shared": np.nan if shared is None or single else len(shared),
        "sd p": mean_shared(lambda one: one.deviation),
        "TV": mean_shared(lambda one: one.variation),
        **{
            name: " ".join(f"{value:.{digits}f}" for value in values)
            for name, values, digits in zip(_OF_EACH, each, (radius_decimals, 3), strict=True)
        },
    }


def _interval(seeds: list[Members]) -> tuple[float, float]:
    """The 95 % interval of what the vote adds: over images, and over seeds where there are several."""
    if len(seeds[0].alone) < 2:
        return np.nan, np.nan
    return interval_over_seeds(np.stack([one.adds[np.argsort(one.idx)] for one in seeds]))


def remarks(runs: list[Run]) -> list[str]:
    """What a reader of the table must know: its columns, and what --skip_wrong and --sequential make of them."""
    lines = []
    if any(run.heads and run.heads.total > 1 for run in runs):
        lines.append(
            "ACR and clean: of the vote; mean ACR, mean clean: of its members, each alone; adds: the difference of "
            "these ACRs, with its 95 % interval from low to high. sd p: the deviation over members of the label's "
            "share of votes; TV: the total variation between two members' votes, 0 where all agree; both are means "
            "over the shared images, which all ensembles that were certified alike have counted."
        )
    if any(run.config and run.config.skip_wrong for run in runs):
        lines.append(
            "drawn: images whose votes were counted. On the others (--skip_wrong) the vote is wrong and its members "
            "count as wrong: their figures are lower bounds, and what the vote adds is an upper bound."
        )
    if any(run.config and run.config.sequential for run in runs):
        lines.append(
            "Sequential runs stop when the vote's radii are decided, not its members': ACRs are lower bounds, and what "
            "the vote adds there is not that of a fixed N."
        )
    return lines
