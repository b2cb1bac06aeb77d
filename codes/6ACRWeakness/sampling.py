"""Which training images ACR-weakness keeps, and how often it draws them (Sun et al., ICML 2025)."""

import numpy as np
from scipy.special import ndtri

from spacte.smooth.bounds import lower_confidence_bound
from spacte.utils import UserError

_ALPHA = 0.1  # of the bound on an image's share of right votes


def kept(right: np.ndarray, n: int, threshold: float) -> np.ndarray:
    """Which images stay: those of whose n votes a share of at least `threshold` is right. right [N] -> bool [N]."""
    return right >= threshold * n - 1e-9  # a share that is the threshold stays, however threshold * n was rounded


def check_votes(n: int) -> None:
    """UserError if n is so small that 3/4 of n votes certify no radius."""
    if not _radius(3 * n // 4, n) > 0:
        raise UserError(f"--num_noise_dataset_weight {n} is too few to weight images: choose 12 or at least 14")


def weights(right: np.ndarray, n: int) -> np.ndarray:
    """How often images are drawn, in proportion: [N] right votes of n -> [N] positive weights.

    A weight is the radius, in units of sigma, that the votes certify at confidence 0.9; fewer than 3/4 right count as
    3/4. Raises UserError as `check_votes` does. Source: arXiv 2410.06895.
    """
    check_votes(n)
    least = 3 * n // 4
    radii = np.array([_radius(count, n) for count in range(least, n + 1)])
    return radii[np.maximum(right, least) - least]


def _radius(right: int, n: int) -> float:
    """Phi^-1 of the one-sided Clopper-Pearson bound."""
    return float(ndtri(lower_confidence_bound(right, n, _ALPHA)))
