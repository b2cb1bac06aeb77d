"""Certificates from votes: what a run's configuration makes of the counts of an image."""

import pandas as pd

from spacte.logs.certlog import COLUMNS, format_row, round_down
from spacte.logs.config import RunConfig
from spacte.logs.counts import VoteCounts
from spacte.smooth.certificates import Certificate
from spacte.utils import UserError


def certificate_of(config: RunConfig) -> Certificate:
    """How the votes of a run with this configuration become certificates."""
    # the exact noise's law is off by at most `noise_slack`: bounds at alpha - slack fail with at most alpha under it
    level, sequential = config.alpha - config.noise_slack, config.sequential is not None
    return Certificate(level, config.noise_sd, sequential, config.certificate)


def certified(counts: VoteCounts, config: RunConfig) -> tuple[int, float]:
    """(class, radius) of the voter that a run's configuration names; see Certificate for the guarantee."""
    voter = config.heads.voter
    return certificate_of(config)(counts.selection[voter], counts.estimation[voter])


def check_certificate(certificate: str, classes: int) -> None:
    """UserError where the certificate needs more classes."""
    if certificate == "all-votes" and classes < 2:
        raise UserError("--certificate all-votes needs at least 2 classes: take cohen")


def largest_radius(config: RunConfig, classes: int = 2) -> float:
    """The radius of an image whose N votes all agree. UserError where not even that is a certificate.

    Of two classes it is both certificates'; of more, that from all the votes is smaller.
    """
    n, alpha, slack = config.N, config.alpha, config.noise_slack
    if alpha <= slack:
        raise UserError(
            f"--alpha {alpha} is below what --exact_noise costs at --N {n}, {slack:.3g}: take a larger alpha"
        )
    certificate = certificate_of(config)
    radius = certificate.radius(n, 0, n, classes)
    if radius is None:
        raise UserError(
            f"--N {n} at --alpha {alpha} can never certify: even {n} votes of {n} do not bound the probability above "
            f"1/2; take at least {_fewest_certifying(certificate, n, classes)}"
        )
    return radius


def _fewest_certifying(certificate: Certificate, too_few: int, classes: int) -> int:
    """The smallest N, above one that is too small, at which unanimous votes are a certificate."""
    n = too_few
    while certificate.radius(n, 0, n, classes) is None:
        n += 1
    return n


def certificate_row(counts: VoteCounts, config: RunConfig) -> str:
    """An image's line in a certification log."""
    predict, radius = certified(counts, config)
    return format_row(counts.idx, counts.label, predict, radius, counts.seconds)


def log_table(counts: list[VoteCounts], config: RunConfig) -> pd.DataFrame:
    """The certification log that a configuration makes of the votes, with the radii as its file would hold them."""
    rows = []
    for one in counts:
        predict, radius = certified(one, config)
        rows.append((one.idx, one.label, predict, float(round_down(radius)), int(predict == one.label), one.seconds))
    return pd.DataFrame(rows, columns=list(COLUMNS))
