"""Certificates from votes: what a run's configuration makes of the counts of an image."""

import numpy as np
import pandas as pd

from spacte.logs.certlog import COLUMNS, Radii, round_down
from spacte.logs.config import CERTIFIES, RANKED, RunConfig
from spacte.logs.counts import VoteCounts, heads_of
from spacte.smooth.certificates import Certificate
from spacte.smooth.topk import TopK
from spacte.utils import UserError

SAME_RADIUS = 1e-9  # below it two radii are one that was computed in two ways


def certificate_of(config: RunConfig) -> Certificate:
    """How the votes of a run with this configuration become certificates of one class."""
    return Certificate(config.level, config.noise_sd, config.sequential is not None, config.certificate)


def certified(counts: VoteCounts, config: RunConfig) -> tuple[int, float]:
    """(class, radius) of the voter that a run's configuration names; see Certificate and TopK for the guarantee.

    The class is the one that the selection votes choose; with a top_k it is the label.
    """
    voter = config.heads.voter
    if config.top_k is not None:
        return _top_k(config, config.top_k)(counts.label, counts.estimation[voter])
    return certificate_of(config)(counts.selection[voter], counts.estimation[voter])


def _top_k(config: RunConfig, k: int) -> TopK:
    return TopK(config.level, config.noise_sd, k, config.sequential is not None, config.certificate)


def check_certificate(certificate: str, classes: int, top_k: int | None = None) -> None:
    """UserError if the certificate needs more classes."""
    if certificate == "all-votes" and classes < 2:
        raise UserError("--certificate all-votes needs at least 2 classes: take cohen")
    if top_k is not None and not 2 <= top_k < classes:
        raise UserError(f"--top_k {top_k}: of {classes} classes, choose 2 to {classes - 1}")


def check_recertifiable(config: RunConfig, classes: int) -> None:
    """UserError if votes among that many classes cannot be certified as a configuration says."""
    check_certificate(config.certificate, classes, config.top_k)
    if config.top_k is not None and config.skip_wrong:
        raise UserError("--top_k needs votes on every image, and the log was made with --skip_wrong: make one without")


def known_radii(config: RunConfig | None, radii: Radii) -> np.ndarray:
    """Booleans [R]: whether the log tells, at each of the radii, the certified accuracy that N fixed draws would give.

    True everywhere with a fixed N, which is assumed of a log without a configuration. A run that stopped early tells it
    at the radii of its own stopping rule and at those that N draws cannot reach; one that stopped within a tolerance at
    all radii, with certified radii known to within the tolerance. False everywhere if the rule was asked about
    certificates other than these.
    """
    radii = np.asarray(radii, dtype=float)
    if config is None or config.sequential is None:
        return np.ones(len(radii), dtype=bool)
    stopping = config.sequential
    if not stopping.decides or stopping.tolerance is not None:
        return np.full(len(radii), stopping.decides)
    chosen = np.asarray(stopping.radii or (), dtype=float)
    known = (np.abs(radii[:, None] - chosen) < SAME_RADIUS).any(axis=1)
    return known | (radii > _reach(config))


def _reach(config: RunConfig) -> float:
    """The radius that not even unanimous votes exceed; infinite where the configuration does not tell."""
    if config.lacks(CERTIFIES, RANKED):
        return np.inf
    return _of_unanimous_votes(config, config.N, classes=2) or 0.0


def largest_radius(config: RunConfig, classes: int = 2) -> float:
    """The radius of an image whose N votes all agree. UserError if not even that is a certificate.

    Of two classes it is both certificates'; of more, that from all the votes is smaller.
    """
    n, alpha = config.N, config.alpha
    if config.level <= 0:
        raise UserError(
            f"--alpha {alpha} is below what --exact_noise costs at --N {n}, {config.noise_slack:.3g}: "
            "take a larger alpha"
        )
    radius = _of_unanimous_votes(config, n, classes)
    if radius is None:
        raise UserError(
            f"--N {n} at --alpha {alpha} can never certify: even {n} votes of {n} do not bound the probability above "
            f"1/{(config.top_k or 1) + 1}; take at least {_fewest_certifying(config, classes)}"
        )
    return radius


def _of_unanimous_votes(config: RunConfig, n: int, classes: int) -> float | None:
    if config.top_k is not None:
        return _top_k(config, config.top_k).radius(n, (0,) * config.top_k, n)
    return certificate_of(config).radius(n, 0, n, classes)


def _fewest_certifying(config: RunConfig, classes: int) -> int:
    """The smallest N, above one that is too small, at which unanimous votes are a certificate."""
    n = config.N
    while _of_unanimous_votes(config, n, classes) is None:
        n += 1
    return n


def check_draws(counts: VoteCounts, config: RunConfig) -> None:
    """UserError if the votes are not of as many draws as the configuration says, or the head that votes is missing."""
    selected, estimated = int(counts.selection[-1].sum()), int(counts.estimation[-1].sum())
    legal = range(1, config.N + 1) if config.sequential else (config.N,)
    unneeded = config.skip_wrong and estimated == 0
    if ("N0" not in config.lacking and selected != config.N0) or not (estimated in legal or unneeded):
        drawn = f"{selected} selection and {estimated} estimation votes"
        raise UserError(f"not a vote count of this run: {drawn}, where N0 is {config.N0} and N {config.N}")
    check_voter(config, len(counts.estimation))


def check_voter(config: RunConfig, voters: int) -> None:
    """UserError if the head that votes alone is not among the voters."""
    heads = heads_of(voters)
    if config.head is not None and config.head >= heads:
        raise UserError(f"not a vote count of this run: head {config.head} votes, and there are 0..{heads - 1}")


def log_table(counts: list[VoteCounts], config: RunConfig) -> pd.DataFrame:
    """The certification log that a configuration makes of the votes, with the radii as its file would hold them."""
    rows = []
    for one in counts:
        predict, radius = certified(one, config)
        rows.append((one.idx, one.label, predict, float(round_down(radius)), int(predict == one.label), one.seconds))
    return pd.DataFrame(rows, columns=list(COLUMNS))
