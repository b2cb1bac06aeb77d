"""When enough has been drawn: rules that end an image's estimation draws early.

A rule can be chosen freely: it only decides when to stop, and the anytime-valid bounds hold whenever that is.
Cohen's certificate has rules of its own, which compare the class's votes with thresholds that are computed once for all
images; with all votes two radii depend on two counts, and are bracketed at each look.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from spacte.smooth.bounds import (
    anytime_bound_reaches,
    anytime_lower_bound,
    lower_confidence_bound,
    radius_of,
    upper_confidence_bound,
)
from spacte.smooth.certificates import Certificate

GIVE_UP = 0.01  # the level of the bound by which a radius is given up, unless another is asked for


class RadiiDecided:
    """Stop once each of the `radii` is either certified or given up.

    A radius is given up if it would be missed even in a favourable case: the votes expected after all `n_max` draws, if
    p_A were its upper confidence bound at level 1 - give_up, do not certify it. A larger `give_up` saves draws and
    loses some certificates at the border.
    """

    def __init__(self, radii: Sequence[float], n_max: int, alpha: float, sigma: float, give_up: float = GIVE_UP):
        self.n_max, self.alpha, self.give_up = n_max, alpha, give_up
        self.needed = ndtr(np.asarray(radii, dtype=float) / sigma)  # p_A of each radius
        self.votes = np.array([_votes_needed(p, n_max, alpha) for p in self.needed])

    def __call__(self, selection: np.ndarray, estimation: np.ndarray) -> bool:
        """Whether these votes [K] are enough to stop."""
        return bool(self.enough(*_votes(selection, estimation)))

    def enough(self, n_a: ArrayLike, n: int) -> np.ndarray:
        """Whether n_a votes of n, a number or an array of them, are enough to stop."""
        n_a = np.asarray(n_a)[..., None]  # [..., 1] against the radii
        certified = anytime_bound_reaches(n_a, n, self.needed, self.alpha)
        expected = n_a + (self.n_max - n) * upper_confidence_bound(n_a, n, self.give_up)
        return np.all(certified | (expected < self.votes), axis=-1)


class RadiusKnown:
    """Stop once the radius is known to within `tolerance`: between its anytime lower and a 99 % upper bound.

    The upper bound on p_A is capped at the anytime bound of `n_max` unanimous votes. Where it is below 1/2, hardly
    anything can be certified, and nothing more is drawn. It only decides when to stop, so validity does not depend on
    its level: 99 % is enough.
    """

    def __init__(self, tolerance: float, n_max: int, alpha: float, sigma: float):
        self.tolerance, self.alpha, self.sigma = tolerance, alpha, sigma
        self.most = anytime_lower_bound(n_max, n_max, alpha)

    def __call__(self, selection: np.ndarray, estimation: np.ndarray) -> bool:
        """Whether these votes [K] are enough to stop."""
        return self.enough(*_votes(selection, estimation))

    def enough(self, n_a: int, n: int) -> bool:
        """Whether n_a votes of n are enough to stop."""
        upper = radius_of(min(upper_confidence_bound(n_a, n, GIVE_UP), self.most), self.sigma)
        if upper is None or upper <= self.tolerance:
            return True
        return bool(anytime_bound_reaches(n_a, n, ndtr((upper - self.tolerance) / self.sigma), self.alpha))


class AllVotesDecided:
    """The two rules above for the certificate from all the votes, which needs the strongest other class's votes, too.

    Stop once each of `radii` is certified or given up or, where a `tolerance` stands in their place, once the radius is
    known to within it. The radius hoped for is the one after all `n_max` draws if p_A were its 1 - give_up upper
    confidence bound and the other class's probability its lower one.

    To save time the certified and the hoped radius are only bracketed, until both ends of the brackets give the same
    answer. The exact radii would give it, too, since it is monotone: a larger certified radius or a smaller hoped one
    never turns "stop" into "go on". The last bracket is the exact radii, so that there always is an answer.
    """

    def __init__(
        self, certificate: Certificate, n_max: int, radii: Sequence[float] = (), tolerance: float | None = None,
        give_up: float = GIVE_UP,
    ):  # fmt: skip
        self.certificate, self.n_max, self.radii = certificate, n_max, np.asarray(radii, dtype=float)
        self.tolerance, self.give_up = tolerance, give_up

    def __call__(self, selection: np.ndarray, estimation: np.ndarray) -> bool:
        """Whether these votes [K] are enough to stop."""
        chosen, n = int(selection.argmax()), int(estimation.sum())
        n_a, n_b, left = int(estimation[chosen]), int(np.delete(estimation, chosen).max(initial=0)), self.n_max - n
        hoped_a = min(self.n_max, n_a + left * upper_confidence_bound(n_a, n, self.give_up))
        hoped_b = n_b + left * lower_confidence_bound(n_b, n, self.give_up)
        votes = ([n_a, hoped_a], [n_b, min(hoped_b, self.n_max - hoped_a)], [n, self.n_max])
        for least, most in self.certificate.radius_brackets(*votes, len(estimation)):
            decided = self._decided(least[0], most[1]), self._decided(most[0], least[1])
            if decided[0] == decided[1]:  # hence for all radii in between
                break
        return decided[0]

    def _decided(self, now: float, hoped: float) -> bool:
        """Whether no further draw can help, where `now` is certified; a negative radius stands for none."""
        if self.tolerance is not None:
            return bool(hoped < 0 or hoped - max(now, 0.0) <= self.tolerance)
        return bool(np.all((self.radii <= now) | (self.radii > hoped)))


def _votes(selection: np.ndarray, estimation: np.ndarray) -> tuple[int, int]:
    """The selected class's votes, and all."""
    return int(estimation[selection.argmax()]), int(estimation.sum())


def _votes_needed(p: float, n: int, alpha: float) -> int:
    """The fewest votes of n whose anytime bound reaches p; n + 1 where not even n do."""
    return bisect.bisect_left(range(n + 1), True, key=lambda votes: anytime_bound_reaches(votes, n, p, alpha))
