"""A certification log from votes: what a run's configuration makes of the counts of an image."""

import pandas as pd

from spacte.logs.certlog import COLUMNS, format_row, round_down
from spacte.logs.votes import VoteCounts
from spacte.smooth.certificates import Certificate
from spacte.utils import UserError


def voter_of(config: dict) -> int:
    """The row of the vote counts that a run's log is about: a head's, or -1, the ensemble's."""
    return -1 if config["head"] is None else config["head"]


def of_head(config: dict, head: int) -> dict:
    """The configuration of a head alone, of a run with this one; a head of a consensus has voted on every copy.

    UserError where the votes are not heads': a consensus of networks of several heads counts whole networks.
    """
    if config.get("consensus") and len(config["num_heads"]) > 1 and max(config["num_heads"]) > 1:
        raise UserError("the counts of a consensus of networks are of networks, not of heads: no head is alone in them")
    return {name: value for name, value in config.items() if name != "consensus"} | {"head": head}


def certificate_of(config: dict) -> Certificate:
    """How the votes of a run with this configuration become certificates."""
    kind = config.get("certificate", "cohen")  # older configurations do not name it
    # the exact noise's law is off by at most `noise_slack`: bounds at alpha - slack fail with at most alpha under it
    return Certificate(config["alpha"] - config["noise_slack"], config["noise_sd"], bool(config["sequential"]), kind)


def certified(counts: VoteCounts, config: dict) -> tuple[int, float]:
    """(class, radius) of the voter that a run's configuration names; see Certificate for the guarantee."""
    voter = voter_of(config)
    return certificate_of(config)(counts.selection[voter], counts.estimation[voter])


def largest_radius(config: dict, classes: int = 2) -> float:
    """The radius of an image whose N votes all agree. UserError where not even that is a certificate.

    Of two classes it is both certificates'; of more, that from all the votes is smaller.
    """
    n, alpha, slack = config["N"], config["alpha"], config["noise_slack"]
    if alpha <= slack:
        raise UserError(
            f"--alpha {alpha} is below what --exact_noise costs at --N {n}, {slack:.3g}: take a larger alpha"
        )
    radius = certificate_of(config).radius(n, 0, n, classes)
    if radius is None:
        raise UserError(
            f"--N {n} at --alpha {alpha} can never certify: even {n} votes of {n} do not bound the probability above "
            f"1/2; take at least {_fewest_certifying(certificate_of(config), n, classes)}"
        )
    return radius


def _fewest_certifying(certificate: Certificate, too_few: int, classes: int) -> int:
    """The smallest N, above one that is too small, at which unanimous votes are a certificate."""
    n = too_few
    while certificate.radius(n, 0, n, classes) is None:
        n += 1
    return n


def certificate_row(counts: VoteCounts, config: dict) -> str:
    """An image's line in a certification log."""
    predict, radius = certified(counts, config)
    return format_row(counts.idx, counts.label, predict, radius, counts.seconds)


def log_table(counts: list[VoteCounts], config: dict) -> pd.DataFrame:
    """The certification log that a configuration makes of the votes, with the radii as its file would hold them."""
    rows = []
    for one in counts:
        predict, radius = certified(one, config)
        rows.append((one.idx, one.label, predict, float(round_down(radius)), int(predict == one.label), one.seconds))
    return pd.DataFrame(rows, columns=list(COLUMNS))
