"""A certificate from votes that a class is among the k most probable ones: pure functions of arrays."""

from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
from scipy.special import ndtr, ndtri

from spacte.smooth.bounds import anytime_lower_bound, lower_confidence_bound, upper_confidence_bound
from spacte.smooth.certificates import ABSTAIN, validate_certificate

_HALVINGS = 60  # of an interval that holds the radius: as narrow as double precision


@dataclass(frozen=True)
class TopK:
    """How votes certify that a class is among the k most probable ones, with probability at least 1 - alpha.

    The class A is fixed before the estimation draws, as a label is. `kind` and `sequential` are Certificate's: "cohen"
    bounds A's probability alone, "all-votes" also those of the strongest other classes.

    The robust radius. At x let p be the classes' probabilities, T the k most probable classes other than A, and S_t the
    t least probable ones of T. For 1 <= t <= k let r_t be the root of

        t Phi(Phi^-1(p_A) - r/sigma) = Phi(Phi^-1(p(S_t)) + r/sigma),        none where t p_A <= p(S_t).

    No perturbation shorter than max_t r_t takes A out of the k most probable classes (Jia et al., ICLR 2020, theorem
    1). For if it did, at x' say, some set W of k other classes would each have at least A's probability there. Let V be
    the t classes of W that are least probable at x, so that p(V) <= p(S_t). By the lemma of Neyman and Pearson A's
    probability at x' is at least 1/t of the left side, V's at most the right side; and V's is at least t times A's.

    The certificate. Of n draws A has n_A votes, the other classes n_(1) >= n_(2) >= ... votes. With

        L   = lower bound on p_A from n_A at level alpha/2
        m_t = n_(k-t+1) + ... + n_(k), the votes of the t weakest of the k strongest other classes
        U_t = min(upper bound from m_t at level alpha / (2 k C(k, t)), 1 - L)

    the radius is the largest of the roots that have L and U_t in place of p_A and p(S_t); nothing is certified where
    there is none. In the proof max_t r_t counts as -1 where A is not among the k most probable classes at x itself.

    Proof. T and its subsets are fixed sets of classes: unknown, but no functions of the draws.

    1. Let V be the t classes of T with the fewest votes. T has k classes, none of them A, so V has at most m_t votes.
       S_t is the least probable of the subsets of t classes, so that p(V) >= p(S_t).
    2. If the upper bound from m_t is below p(S_t), then the one from V's votes is below p(V): it fails for one of the
       C(k, t) fixed subsets of T. For one t that happens with probability at most alpha/(2k), for any with alpha/2.
    3. The radius grows with L and falls with each U_t. If it exceeds max_t r_t, then L > p_A, or U_t < p(S_t) for some
       t. If L <= p_A, then 1 - L >= 1 - p_A >= p(S_t): then it is the bound from m_t that is below p(S_t).
    4. So the radius exceeds max_t r_t with probability at most alpha/2 + alpha/2.

    With "cohen", L is at level alpha and every U_t is 1 - L, so that t = k has the largest root. If n is a stopping
    time the bounds are anytime-valid, and the four steps hold at every n at once. For k = 1 the radius is
    Certificate's, of more than two classes.
    """

    alpha: float
    sigma: float
    k: int
    sequential: bool = False
    kind: str = "cohen"

    def __post_init__(self) -> None:
        """ValueError for an unknown kind, an alpha of 1 or more, or a k below 1; numbers become Python's."""
        validate_certificate(self)
        if self.k < 1:
            raise ValueError(f"top {self.k}: k must be at least 1")

    @lru_cache(maxsize=2**14)  # noqa: B019 (a value, like what it is computed from)
    def radius(self, n_a: int, strongest: tuple[int, ...], n: int) -> float | None:
        """The L2 radius that n_a of n votes for a class certify; None where nothing is certified.

        `strongest` are the votes of the k strongest other classes, descending.
        """
        if self.alpha <= 0:
            return None
        bound = anytime_lower_bound if self.sequential else lower_confidence_bound
        if self.kind == "cohen":
            low = bound(n_a, n, self.alpha)
            sizes, highs = [self.k], [1 - low]
        else:
            low = bound(n_a, n, self.alpha / 2)
            sizes = list(range(1, self.k + 1))
            levels = [self.alpha / (2 * self.k * comb(self.k, t)) for t in sizes]
            bounds = [upper_confidence_bound(sum(strongest[self.k - t :]), n, level, self.sequential)
                      for t, level in zip(sizes, levels, strict=True)]  # fmt: skip
            highs = [min(high, 1 - low) for high in bounds]
        root = float(np.max(robust_radii(low, np.array(highs), np.array(sizes))))
        return None if root < 0 else self.sigma * root

    def __call__(self, chosen: int, estimation: np.ndarray) -> tuple[int, float]:
        """(chosen, radius) from the votes [K] of draws on which the class `chosen` does not depend.

        (ABSTAIN, 0.0) where nothing is certified. ValueError if K is not above k: A is then always among them.
        """
        if len(estimation) <= self.k:
            raise ValueError(f"top {self.k} of {len(estimation)} classes says nothing")
        others = np.sort(np.delete(estimation, chosen))[::-1][: self.k]
        n = int(estimation.sum())
        radius = self.radius(int(estimation[chosen]), tuple(others.tolist()), n) if n else None
        return (ABSTAIN, 0.0) if radius is None else (chosen, radius)


def robust_radii(p_a: float, p_s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The roots r_t of TopK in units of sigma for probabilities p_S [T] of sets of t [T] classes; -1: none.

    A root is never rounded up by more than the error of Phi.
    """
    a, b = ndtri(min(p_a, 1 - 2**-53)), ndtri(np.maximum(p_s, 1e-300))  # finite
    # at `above` the right side is at least 1/2 and the left one at most that
    below, above = np.zeros(len(t)), np.maximum(np.maximum(a - ndtri(1 / (2 * t)), -b), 0.0)
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        holds = t * ndtr(a - middle) > ndtr(b + middle)
        below, above = np.where(holds, middle, below), np.where(holds, above, middle)
    return np.where(t * p_a > p_s, below, -1.0)
