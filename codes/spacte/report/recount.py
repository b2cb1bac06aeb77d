"""What the votes beside a run's log tell: its radii under another certificate, its heads alone, its probabilities."""

import functools
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr

from spacte.logs.certified import check_draws, check_recertifiable, log_table
from spacte.logs.config import CERTIFIES, MAKES_ROWS, RANKED, RunConfig
from spacte.logs.counts import VoteCounts, mean_draws, read_counts
from spacte.logs.runfiles import RunFiles
from spacte.report.run import Run
from spacte.utils import UserError


def recertify(run: Run, certificate: str | None = None, top_k: int | None = None) -> Run:
    """The run with the log that its counts give under a certificate ("cohen", "all-votes"), or for top k.

    Raises UserError if no counts or no configuration lie beside the log, or they cannot be certified so.
    """
    counts = needed_counts(run, "its certificates are fixed")
    config = run.required_config
    config = config.with_certificate(certificate=certificate or config.certificate, top_k=top_k or config.top_k)
    try:
        check_recertifiable(config, counts[0].estimation.shape[1])
    except UserError as error:
        raise UserError(f"'{run.path}': {error}") from error
    return replace(run, log=tabled(run, counts, config), config=config)


def tabled(run: Run, counts: list[VoteCounts], config: RunConfig) -> pd.DataFrame:
    """The log that a configuration makes of a run's counts, in the run's norm."""
    return run.rescaled(log_table(counts, config))


def heads_alone(run: Run) -> list[Run]:
    """A run for each head of several, certified from its own votes; none, with a warning, where no counts tell.

    Raises UserError if the heads were not counted on every image.
    """
    if run.heads is not None and (run.heads.head is not None or run.heads.networks == (1,)):
        return []
    votes = counts_of(run, "its heads alone are left out")
    if votes is None:
        return []
    config = run.required_config
    if config.skip_wrong:
        raise UserError(f"'{run.path}' was made with --skip_wrong: the heads alone were not counted on every image")
    if config.consensus:
        text = f"'{run.path}' used --consensus: only its first {config.consensus} heads have rows of their own"
        warnings.warn(text, stacklevel=2)
    try:
        configs = [config.of_head(head) for head in range(len(votes[0].selection) - 1)]
    except UserError as error:
        warnings.warn(f"'{run.path}': {error}", stacklevel=2)
        return []
    return [replace(run, log=tabled(run, votes, one), heads=one.heads, config=one) for one in configs]


def draws_of(run: Run) -> float | None:
    """The mean number of draws that estimated an image's radius; None where nothing tells."""
    config = run.config
    if config is None or config.lacks(MAKES_ROWS, RANKED):
        return None
    if config.sequential is None and not config.skip_wrong:
        return float(config.N)
    return mean_draws(_counts_behind(run)) if RunFiles(run.path).counts.exists() else None


def counts_of(run: Run, consequence: str) -> list[VoteCounts] | None:
    """The vote counts beside a log, in its order; None where they or the configuration are missing.

    A warning then says so, and what follows from it, `consequence`.

    Raises UserError if they or the configuration are not this log's.
    """
    lacking = _lacking(run)
    if lacking:
        warnings.warn(f"{lacking} beside '{run.path}': {consequence}", stacklevel=3)
        return None
    return _counts_behind(run)


def needed_counts(run: Run, consequence: str) -> list[VoteCounts]:
    """The vote counts beside a log, in its order. UserError, which says so, where they do not tell."""
    lacking = _lacking(run)
    if lacking:
        raise UserError(f"{lacking} beside '{run.path}': {consequence}")
    return _counts_behind(run)


def _lacking(run: Run) -> str:
    """What of vote counts and configuration is not there; "" where both are."""
    if not RunFiles(run.path).counts.exists():
        return "no vote counts lie"
    return "" if run.config else "no configuration lies"


@functools.lru_cache(maxsize=1)  # a page asks for those of a run again and again
def _read_counts(path: Path, changed: int) -> list[VoteCounts]:
    return read_counts(path)


def votes_of(run: Run, or_selection: bool = False) -> list[np.ndarray] | None:
    """Each image's estimation votes [K] for the run's voter, in the log's order; None where no counts tell.

    `or_selection`: of an image that --skip_wrong drew none for, its selection votes.
    """
    if _lacking(run) or run.required_config.lacks(CERTIFIES):
        return None
    voter, counts = run.required_config.heads.voter, _counts_behind(run)
    return [(one.selection if or_selection and not one.estimation.any() else one.estimation)[voter] for one in counts]


def label_probabilities(run: Run) -> np.ndarray:
    """The probability of each image's label under noise, [images]: the share of votes for it.

    Without counts the lower bound that the radius implies, at least 1/2, and 0 where the image is wrong or abstained.
    """
    votes = votes_of(run, or_selection=True)
    if votes is not None:
        return np.array([one[label] / one.sum() for one, label in zip(votes, run.log["label"], strict=True)])
    if run.certificate not in (None, "cohen"):
        raise UserError(f"--ecdf: '{run.path}' has no votes, and its {run.certificate} radii tell no probabilities")
    if run.sigma is None:
        raise UserError(f"--ecdf: neither the votes nor the sigma of '{run.path}' are known")
    right = run.log["correct"] == 1
    return np.where(right, ndtr(run.log["radius"] / run.per_l2 / run.sigma), 0.0)


def _counts_behind(run: Run) -> list[VoteCounts]:
    """The counts beside a log; UserError if they or the configuration are not this log's."""
    files = RunFiles(run.path)
    wrong = run.required_config.lacks(CERTIFIES)
    if wrong:
        raise UserError(f"'{files.json}': {', '.join(wrong)} missing or wrong: the counts cannot be certified")
    counts = _read_counts(files.counts, os.stat(files.counts).st_mtime_ns)
    counts = counts[: len(run.log)]  # of a running program they may be a row ahead of the log
    if [one.idx for one in counts] != run.log["idx"].tolist():
        raise UserError(f"'{files.counts}' holds other images than '{run.path}'")
    for one in counts:
        try:
            check_draws(one, run.required_config)
        except UserError as error:
            raise UserError(f"'{files.counts}', idx {one.idx}: {error}") from error
    return counts
