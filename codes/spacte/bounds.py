"""Bounds on a Bernoulli probability from counts: pure functions."""

import math

from scipy import stats


def lower_confidence_bound(n_a: int, n: int, alpha: float) -> float:
    """The exact one-sided Clopper-Pearson bound: P(bound > p_A) <= alpha over n_A ~ Binomial(n, p_A).

    n_a successes in n independent draws, alpha in (0, 1); 0 where n_a is 0.
    Source: Clopper and Pearson (1934); Cohen et al. (ICML 2019), LowerConfBound.
    """
    if not 0 <= n_a <= n or n < 1:
        raise ValueError(f"{n_a} successes in {n} draws: 0 <= n_a <= n and n >= 1 are needed")
    return float(stats.beta.ppf(alpha, n_a, n - n_a + 1)) if n_a > 0 else 0.0


def radius_of(p_lower: float, sigma: float) -> float | None:
    """The certified L2 radius sigma * Phi^-1(p_lower), or None (abstain) where p_lower is below 1/2."""
    return None if p_lower < 0.5 else sigma * float(stats.norm.ppf(p_lower))


def largest_radius(n: int, alpha: float, sigma: float) -> float | None:
    """The radius that n draws certify when all of them agree; None where not even they can."""
    return radius_of(math.exp(math.log(alpha) / n), sigma)
