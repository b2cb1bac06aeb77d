"""How votes become predictions and certificates: pure functions of arrays, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc, ndtri

from spacte.smooth.bounds import (
    anytime_brackets,
    anytime_lower_bound,
    lower_confidence_bound,
    radius_of,
    upper_confidence_bound,
)

ABSTAIN = -1
CERTIFICATES = ("cohen", "all-votes")


def validate_certificate(certificate: Any) -> None:
    """Make a certificate's `alpha` and `sigma` Python floats. ValueError for an unknown `kind`, or an `alpha` >= 1."""
    for name in ("alpha", "sigma"):
        object.__setattr__(certificate, name, float(getattr(certificate, name)))
    if certificate.kind not in CERTIFICATES:
        raise ValueError(f"certificate '{certificate.kind}': choose from {', '.join(CERTIFICATES)}")
    if not certificate.alpha < 1:
        raise ValueError(f"alpha {certificate.alpha}: it must be below 1")


def check_alpha(alpha: float) -> None:
    """ValueError unless 0 < alpha < 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha}: it must be above 0 and below 1")


@dataclass(frozen=True)
class Certificate:
    """How votes become a certificate that holds with probability at least 1 - alpha.

    `kind`: "cohen" bounds the class's probability alone and takes all other votes for one class (Cohen et al., ICML
    2019, theorem 1 and algorithm CERTIFY); "all-votes" bounds the strongest other class, too: see below.
    `sequential`: the number of estimation draws may depend on what was drawn, so the bounds are the anytime-valid ones.

    The certificate from all votes. The selection votes choose the class A; of n further, independent draws A has n_A
    votes and the strongest other class n_B.

        L = lower bound on p_A from n_A at level alpha/2,   U = min(upper bound from n_B at level alpha/2, 1 - L)
        radius = sigma/2 (Phi^-1(L) - Phi^-1(U)) where L > U, also where L < 1/2

    Proof. Let B be the class other than A whose probability p_B is the largest. A is fixed by the selection draws, so B
    is a fixed class: it is unknown, but no function of the estimation draws. Cohen et al. (ICML 2019), theorem 1: no
    perturbation shorter than r = sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)) changes the class.

    1. The bound U_c from the votes n_c of a fixed class c fails, U_c < p_c, with probability at most alpha/2; so does
       L > p_A. U_c grows with n_c, hence the upper bound from n_B's votes, the most of all other classes, is max_c U_c.
    2. If the radius exceeds r, then L > p_A or U < p_B.
    3. If L <= p_A, then 1 - L >= 1 - p_A >= p_B, so that U < p_B means max_c U_c < p_B, and so U_B < p_B, for this one
       class B.
    4. So the radius exceeds r only if L > p_A or U_B < p_B: with probability at most alpha/2 + alpha/2.

    The level alpha/2 is not divided among the K - 1 other classes, since only the bound of the one class B has to hold.
    The strongest other class may be read off the estimation votes because the largest of the bounds is taken. It would
    not be valid to bound only the runner-up of the selection votes, nor to choose A by the estimation votes. If n is a
    stopping time, the bounds are anytime-valid, and the same four steps hold at every n at once. With two classes
    p_B = 1 - p_A: there is nothing else to bound, L is taken at level alpha, and the certificate is Cohen et al.'s.
    """

    alpha: float
    sigma: float
    sequential: bool = False
    kind: str = "cohen"

    def __post_init__(self) -> None:
        """ValueError for an unknown kind, or an alpha of 1 or more; one of 0 or less certifies nothing.

        Numbers of numpy and torch become Python floats: in float32 a radius could be rounded up.
        """
        validate_certificate(self)

    @lru_cache(maxsize=2**17)  # noqa: B019 (a value, like what it is computed from)
    def radius(self, n_a: float, n_b: float, n: int, classes: int) -> float | None:
        """The L2 radius certified by n votes, n_a for the class and n_b for the strongest other; None: nothing is.

        Cached, because an image's row, its score and the summary all ask for it.
        """
        if self.alpha <= 0:
            return None
        bound = anytime_lower_bound if self.sequential else lower_confidence_bound
        if self.kind == "cohen" or classes == 2:
            return radius_of(bound(n_a, n, self.alpha), self.sigma)
        low = bound(n_a, n, self.alpha / 2)
        high = min(1 - low, upper_confidence_bound(n_b, n, self.alpha / 2, self.sequential))
        return self.sigma / 2 * float(ndtri(low) - ndtri(high)) if low > high else None

    def radius_brackets(
        self, n_a: ArrayLike, n_b: ArrayLike, n: ArrayLike, classes: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ever narrower (least, most) with least <= radius <= most, for arrays of votes; the last pair is the radius.

        Any negative number stands for no radius. Stopping rules ask on which side of a number the radius
        lies: usually the first pairs tell, at a small part of the radius's cost.

        Both radii are written sigma/2 (Phi^-1(L) - Phi^-1(U)) with U = min(1 - L, 1 - M): for the certificate from all
        votes M is the lower bound on the probability of all classes but the strongest other one, for Cohen et al.'s M
        is L. This grows with L and with M, so their brackets bound it, up to rounding errors, which are far below the
        1e-9 sigma by which the pairs are widened.
        """
        n_a, n_b, n = (np.asarray(votes, dtype=float) for votes in (n_a, n_b, n))
        if self.sequential and self.alpha > 0:
            alone = self.kind == "cohen" or classes == 2
            votes, alpha = ([n_a], self.alpha) if alone else ([n_a, n - n_b], self.alpha / 2)
            for ends in anytime_brackets(np.stack(votes), n, alpha):
                # [2 or 1, ...]: L and, with all the votes, M
                least, most = (self.sigma / 2 * (ndtri(end[0]) - ndtri(1 - end.max(axis=0))) for end in ends)
                yield least - 1e-9 * self.sigma, most + 1e-9 * self.sigma
        radii = [self.radius(*votes, classes) for votes in zip(n_a.flat, n_b.flat, n.flat, strict=True)]
        exact = np.reshape([-1.0 if radius is None else radius for radius in radii], n_a.shape)
        yield exact, exact

    def __call__(self, selection: np.ndarray, estimation: np.ndarray) -> tuple[int, float]:
        """(class, radius) from the votes [K] of the selection draws and of independent estimation draws.

        (ABSTAIN, 0.0) where nothing is certified; (class, 0.0), which claims nothing, where nothing was drawn to
        estimate it.
        """
        selected, votes = int(selection.argmax()), estimation.tolist()  # of few classes a list is faster than an array
        n = sum(votes)
        if n == 0:
            return selected, 0.0
        strongest = max((*votes[:selected], *votes[selected + 1 :]), default=0)
        radius = self.radius(votes[selected], strongest, n, len(votes))
        return (ABSTAIN, 0.0) if radius is None else (selected, radius)


def multiclass_certificate(
    selection: np.ndarray, estimation: np.ndarray, alpha: float, sigma: float, sequential: bool = False
) -> tuple[int, float]:
    """(class, radius) from all the votes: with probability at least 1 - alpha no smaller perturbation changes it.

    `selection` [K] are the votes that choose the class A, `estimation` [K] those of n further, independent draws; A has
    n_A of them, the strongest other class n_B. Returns (ABSTAIN, 0.0) where nothing is certified. `sequential`: n may
    depend on what was drawn. The proof stands with Certificate. Raises ValueError for fewer than two classes and for no
    votes.
    """
    classes = len(estimation)
    if classes < 2 or len(selection) != classes or estimation.sum() < 1 or selection.sum() < 1:
        raise ValueError("selection and estimation votes of the same two or more classes are needed")
    return Certificate(alpha, sigma, sequential, "all-votes")(selection, estimation)


def prediction(votes: np.ndarray, alpha: float) -> int:
    """The class with most of the votes [K], or ABSTAIN where a two-sided binomial test does not tell it from the next.

    With probability at least 1 - alpha the result is the smoothed classifier's class or ABSTAIN. A single class is
    always the winner. ValueError for an alpha of 1 or more. Source: Cohen et al. (ICML 2019), algorithm PREDICT; Hung
    and Fithian (2019).
    """
    if not alpha < 1:
        raise ValueError(f"alpha {alpha}: it must be below 1")
    if len(votes) == 1:
        return 0
    first, second = (int(k) for k in np.argsort(-votes, kind="stable")[:2])
    most, next_most = int(votes[first]), int(votes[second])
    if most == 0:
        return ABSTAIN
    p_value = 2 * betainc(most, next_most + 1, 0.5)  # twice P(X >= most), X ~ Binomial(most + next_most, 1/2)
    return ABSTAIN if p_value > alpha else first


def fewest_deciding_votes(alpha: float) -> int | None:
    """The smallest N at which unanimous votes are a prediction at level alpha; None where no N is: alpha <= 0."""
    if alpha <= 0:
        return None
    n = 1
    while 0.5 ** (n - 1) > alpha:  # the two-sided binomial p-value of n votes of n
        n += 1
    return n
