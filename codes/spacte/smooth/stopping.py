"""When enough was drawn: rules that end an image's estimation draws early.

A rule may be as bold as it likes: it decides when to stop, and the anytime-valid bounds hold whenever that is.
"""

import numpy as np
from scipy import stats

from spacte.smooth.bounds import (
    anytime_lower_bound,
    convinces,
    lower_confidence_bound,
    radius_of,
    upper_confidence_bound,
)
from spacte.smooth.certificates import Certificate


class RadiiDecided:
    """Stop once every one of some radii is either certified or given up.

    Given up means: even if p_A were its 1 - give_up upper confidence bound, the anytime bound after all `n_max` draws
    would be expected to stay below. A larger `give_up` saves draws and loses some certificates at the border.
    """

    def __init__(self, radii, n_max: int, alpha: float, sigma: float, give_up: float = 0.01):
        self.n_max, self.alpha, self.give_up = n_max, alpha, give_up
        self.needed = stats.norm.cdf(np.asarray(radii, dtype=float) / sigma)  # p_A of each radius
        self.votes = np.array([_votes_needed(p, n_max, alpha) for p in self.needed])

    def __call__(self, n_a, n: int):
        """Whether n_a votes of n, a number or an array of them, are enough to stop."""
        n_a = np.asarray(n_a)[..., None]  # [..., 1] against the radii
        certified = convinces(n_a, n, self.needed, self.alpha)
        expected = n_a + (self.n_max - n) * upper_confidence_bound(n_a, n, self.give_up)
        return np.all(certified | (expected < self.votes), axis=-1)


class RadiusKnown:
    """Stop once the radius is known to within `tolerance`: between its anytime lower and a 99 % upper bound.

    The upper bound is at most what all of `n_max` votes would certify. Where it is below 1/2 nothing can be certified,
    and nothing more is drawn.
    """

    def __init__(self, tolerance: float, n_max: int, alpha: float, sigma: float):
        self.tolerance, self.alpha, self.sigma = tolerance, alpha, sigma
        self.most = anytime_lower_bound(n_max, n_max, alpha)

    def __call__(self, n_a: int, n: int) -> bool:
        """Whether n_a votes of n are enough to stop."""
        upper = radius_of(min(upper_confidence_bound(n_a, n, 0.01), self.most), self.sigma)
        lower = radius_of(anytime_lower_bound(n_a, n, self.alpha), self.sigma) or 0.0
        return upper is None or upper - lower <= self.tolerance


class AllVotesDecided:
    """The two rules above for the certificate from all the votes, which needs the strongest other class's votes, too.

    Stop once each of `radii` is certified or given up or, where a `tolerance` stands in their place, once the radius is
    known to within it. What may still be hoped for is the radius after all `n_max` draws if p_A were its 1 - give_up
    upper confidence bound and the other class's probability its lower one.
    """

    def __init__(self, certificate: Certificate, n_max: int, radii=(), tolerance=None, give_up: float = 0.01):
        self.certificate, self.n_max, self.radii = certificate, n_max, np.asarray(radii, dtype=float)
        self.tolerance, self.give_up = tolerance, give_up

    def __call__(self, selection: np.ndarray, estimation: np.ndarray) -> bool:
        """Whether these votes [K] are enough to stop."""
        chosen, n = int(selection.argmax()), int(estimation.sum())
        n_a, n_b, left = int(estimation[chosen]), int(np.delete(estimation, chosen).max()), self.n_max - n
        hoped_a = min(self.n_max, n_a + left * upper_confidence_bound(n_a, n, self.give_up))
        hoped_b = n_b + left * lower_confidence_bound(n_b, n, self.give_up)
        now = self._radius(n_a, n_b, n, len(estimation))
        hoped = self._radius(hoped_a, min(hoped_b, self.n_max - hoped_a), self.n_max, len(estimation))
        if self.tolerance is not None:
            return hoped < 0 or hoped - max(now, 0.0) <= self.tolerance
        return bool(np.all((self.radii <= now) | (self.radii > hoped)))

    def _radius(self, n_a: float, n_b: float, n: int, classes: int) -> float:
        radius = self.certificate.radius(n_a, n_b, n, classes)
        return -1.0 if radius is None else radius


def _votes_needed(p: float, n: int, alpha: float) -> int:
    """The fewest votes of n whose anytime bound reaches p; n + 1 where not even n do."""
    fewest, enough = 0, n + 1
    while enough - fewest > 1:
        middle = (fewest + enough) // 2
        fewest, enough = (fewest, middle) if convinces(middle, n, p, alpha) else (middle, enough)
    return enough
