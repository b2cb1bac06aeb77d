"""How votes become predictions and certificates, and when enough were drawn: pure functions of arrays, no torch."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from spacte.smooth.bounds import anytime_lower_bound, lower_confidence_bound, radius_of

ABSTAIN = -1


@dataclass(frozen=True)
class Certificate:
    """How votes become a certificate that holds with probability at least 1 - alpha.

    `sequential`: the number of estimation draws may depend on what was drawn, so the bound is the anytime-valid one.
    Source: Cohen et al. (ICML 2019), theorem 1 and algorithm CERTIFY.
    """

    alpha: float
    sigma: float
    sequential: bool = False

    def radius(self, n_a: int, n: int) -> float | None:
        """The L2 radius that n_a of n votes certify, in units of sigma's; None where they certify none."""
        if self.alpha <= 0:
            return None
        bound = anytime_lower_bound if self.sequential else lower_confidence_bound
        return radius_of(bound(n_a, n, self.alpha), self.sigma)

    def __call__(self, selection: np.ndarray, estimation: np.ndarray) -> tuple[int, float]:
        """(class, radius) from the votes [K] of the selection draws and of independent estimation draws.

        (ABSTAIN, 0.0) where the class's bound is below 1/2; (class, 0.0), which claims nothing, where nothing was drawn
        to estimate it.
        """
        selected, n = int(selection.argmax()), int(estimation.sum())
        if n == 0:
            return selected, 0.0
        radius = self.radius(int(estimation[selected]), n)
        return (ABSTAIN, 0.0) if radius is None else (selected, radius)


def prediction(votes: np.ndarray, alpha: float) -> int:
    """The class with most of the votes [K], or ABSTAIN where the runner-up may well be the winner.

    With probability at least 1 - alpha the smoothed classifier's class or ABSTAIN. Source: Cohen et al. (ICML 2019),
    algorithm PREDICT; Hung and Fithian (2019). A single class is always the winner.
    """
    if len(votes) == 1:
        return 0
    first, second = (int(k) for k in np.argsort(-votes, kind="stable")[:2])
    most, next_most = int(votes[first]), int(votes[second])
    if most == 0:
        return ABSTAIN
    return ABSTAIN if binomtest(most, most + next_most, 0.5).pvalue > alpha else first


def fewest_deciding_votes(alpha: float) -> int | None:
    """The smallest N at which unanimous votes are a prediction at level alpha; None where no N is: alpha <= 0."""
    if alpha <= 0:
        return None
    n = 1
    while 0.5 ** (n - 1) > alpha:  # the two-sided binomial p-value of n votes of n
        n += 1
    return n
