"""Which training images ACR-weakness keeps, and how often it draws them (Sun et al., ICML 2025)."""

import numpy as np
from scipy.special import ndtri

from spacte.smooth.bounds import lower_confidence_bound
from spacte.utils import UserError

_ALPHA = 0.1  # of the bound on an image's share of right votes


def kept(right: np.ndarray, n: int, threshold: float) -> np.ndarray:
    """Which images stay: those of whose n votes a share of at least `threshold` is right. right [N] -> bool [N]."""
    return right >= threshold * n - 1e-9  # a share that is the threshold stays, however threshold * n was rounded


def weights(right: np.ndarray, n: int) -> np.ndarray:
    """How often images are drawn, in proportion: [N] right votes of n -> [N] positive weights.

    The certified radius, in units of sigma, that the votes would give at confidence 0.9 if at least 3/4 of them were
    right: Phi^-1 of the one-sided Clopper-Pearson bound. Raises UserError if n is so small that 3/4 of the votes
    give none. Source: arXiv 2410.06895.
    """
    least = 3 * n // 4
    radii = np.array([ndtri(lower_confidence_bound(count, n, _ALPHA)) for count in range(least, n + 1)])
    if not radii[0] > 0:
        raise UserError(f"--num_noise_dataset_weight {n} is too few to weight images: choose 12 or at least 14")
    return radii[np.maximum(right, least) - least]
