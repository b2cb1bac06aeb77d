"""Bounds on a Bernoulli probability from counts: pure functions."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

_PRIOR = 0.5  # both parameters of the anytime bound's Beta prior: Jeffreys'


def lower_confidence_bound(n_a: float, n: int, alpha: float) -> float:
    """The exact one-sided Clopper-Pearson bound: P(bound > p_A) <= alpha over n_A ~ Binomial(n, p_A).

    n_a successes in n independent draws, alpha in (0, 1); 0 where n_a is 0.
    Source: Clopper and Pearson (1934); Cohen et al. (ICML 2019), LowerConfBound.
    """
    if not 0 <= n_a <= n or n < 1:
        raise ValueError(f"{n_a} successes in {n} draws: 0 <= n_a <= n and n >= 1 are needed")
    return float(special.betaincinv(n_a, n - n_a + 1, alpha)) if n_a else 0.0


def upper_confidence_bound(n_b: ArrayLike, n: int, alpha: float, sequential: bool = False) -> Any:
    """An upper bound on the probability of a class with n_b of n votes: P(bound < p) <= alpha.

    It is 1 minus the lower bound on the probability of the other n - n_b votes: Clopper and Pearson's for a fixed n,
    the anytime-valid one if `sequential`. `n_b` is a number or an array, and so is what is returned.
    """
    if sequential:
        return 1 - anytime_lower_bound(n - np.asarray(n_b), n, alpha)
    n_b = np.asarray(n_b)
    bound = np.where(n_b < n, special.betainccinv(n_b + 1, n - n_b, alpha), 1.0)
    return bound if np.ndim(n_b) else float(bound)


def anytime_lower_bound(n_a: ArrayLike, n: ArrayLike, alpha: float) -> Any:
    """An anytime-valid lower bound: P(exists n >= 1: bound_n > p_A) <= alpha; one may stop at any n, for any reason.

    n_a successes in n independent draws, numbers or arrays; alpha in (0, 1). Returns a float or an array; 0 where
    n_a is 0.

    Proof. For 0 < p < 1 let pi_p be Beta(1/2, 1/2) conditioned on theta > p, and

        E_n(p) = int theta^A (1-theta)^(n-A) dpi_p(theta) / (p^A (1-p)^(n-A)),    A the successes in n draws.

    1. Under p each likelihood ratio (theta/p)^A ((1-theta)/(1-p))^(n-A) is a non-negative martingale of mean 1.
       The prior pi_p depends on p alone, so their mixture E_n(p) is one, too. Ville's inequality gives
       P(exists n: E_n(p_A) >= 1/alpha) <= alpha.
    2. The bound L_n is the root of E_n(p) = 1/alpha below A/n (E_n <= 1 at A/n). Step 3 shows that E_n crosses 1/alpha
       only once there, so E_n >= 1/alpha on all of (0, L_n]. Hence L_n exceeds p_A only if E_n(p_A) >= 1/alpha. For
       p_A = 0 or 1 there is nothing to show.
    3. E_n crosses 1/alpha once below A/n. E_n(p) -> infinity as p -> 0 (A >= 1). With d = A - n p and the prior's
       hazard h = pi(p)/P(theta > p),

           d/dp log E_n(p) = h (1 - 1/E_n(p)) - d / (p (1-p)) .

       p (1-p) h = sqrt(p (1-p)) / (2 arccos sqrt(p)), which is cos(t) sin(t) / (2t) <= 1/2 at cos(t) = sqrt(p). So
       E_n falls wherever d >= 1/2, and a second crossing needs a root of E_n(p) = 1/alpha with 0 < d < 1/2. There
       the largest likelihood ratio, exp(n KL(A/n || p)) <= exp(d^2 / (n p (1-p))), would have to reach 1/alpha:
       n p (1-p) <= d^2 / log(1/alpha) < 1 / (4 log(1/alpha)) < 1/3 for alpha <= 0.47. But A = n means d = n (1-p),
       so d/p >= log(1/alpha), p < 1/(2 log(1/alpha)) < 2/3 and n (1-p) > n/3; with n (1-p) = d < 1/2 this leaves n = 1
       only, where E_1(p) = int theta dpi_p / p <= 1/p < 2 for p > 1/2 is below 1/alpha. And 1 <= A < n
       means n (1-p) > 1 and n p = A - d > 1/2, so n p (1-p) >= max(p, (1-p)/2) >= 1/3. Contradiction.
    4. An alpha above 0.47 is replaced by 0.47, which only lowers the bound.

    Source: the method of mixtures (Robbins, 1970); Voracek (NeurIPS 2024, arXiv 2406.17830), whose released threshold
    log(1/(2 alpha)) is not valid one-sided; the truncation and its proof are ours.
    """
    *_, (below, _) = anytime_brackets(n_a, n, alpha)
    return float(below) if below.ndim == 0 else below


def anytime_brackets(n_a: ArrayLike, n: ArrayLike, alpha: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ever narrower (below, above) with below <= anytime_lower_bound <= above; the last `below` is that bound itself.

    They are the ends of the bisection that computes the bound, after every fourth step. In floating point, too, each
    midpoint lies between the ends before it, and the last lower end is the bound itself: every pair encloses it.
    """
    n_a, n = np.broadcast_arrays(np.asarray(n_a, dtype=float), np.asarray(n, dtype=float))
    if np.any((n_a < 0) | (n_a > n) | (n < 1)):
        raise ValueError("0 <= n_a <= n and n >= 1 are needed")
    # `below` always has E_n >= 1/alpha, so that what is returned is never above the root
    below, above = np.zeros_like(n_a), n_a / n
    for _ in range(15):
        for _ in range(4):
            middle = (below + above) / 2
            convincing = anytime_bound_reaches(n_a, n, middle, alpha)
            below, above = np.where(convincing, middle, below), np.where(convincing, above, middle)
        yield below, above


def anytime_bound_reaches(n_a: Any, n: Any, p: Any, alpha: float) -> Any:
    """Whether n_a votes of n put the anytime bound at p or above: p < n_a / n, and E_n(p) >= 1/alpha."""
    rounding = 1e-9 + 1e-14 * n  # more than the error of log E_n in double precision, against mpmath up to n = 10^7
    threshold = -math.log(min(alpha, 0.47)) + rounding
    return (p < n_a / n) & (_log_e_value(n_a, n, p) >= threshold)


def _log_e_value(n_a: Any, n: Any, p: Any) -> np.ndarray:
    """log E_n(p) of `anytime_lower_bound`, in closed form; by convention -inf, no evidence, where p is 0 or 1."""
    a, b = _PRIOR + n_a, _PRIOR + n - n_a
    with np.errstate(divide="ignore", invalid="ignore"):
        evidence = special.betaln(a, b) + np.log(special.betaincc(a, b, p))
        prior = special.betaln(_PRIOR, _PRIOR) + np.log(special.betaincc(_PRIOR, _PRIOR, p))
        likelihood = special.xlogy(n_a, p) + special.xlog1py(n - n_a, -p)
        value = evidence - prior - likelihood
    return np.where((p > 0) & (p < 1), value, -np.inf)


def radius_of(p_lower: float, sigma: float) -> float | None:
    """The certified L2 radius sigma * Phi^-1(p_lower), or None (abstain) where p_lower is below 1/2."""
    return None if p_lower < 0.5 else sigma * float(special.ndtri(p_lower))
