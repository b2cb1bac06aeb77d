"""Circular teaching on Gaussian-noised images (base defence: Cohen et al., ICML 2019)."""

from torch import Tensor

from spacte.train.teaching import EXPLORE, CircularLoss, Pace, taught_cross_entropy


def ct_loss(
    logits: Tensor, labels: Tensor, threshold: float | Pace, eps: float, explore: float = EXPLORE
) -> CircularLoss:
    """L_ce = sum_h c_h mean_i w[h-1,i] l[h,i]; `total` is `ce`, `heads` [L] are the heads' losses before c.

    logits [L, m, B, K] of the heads on m noised copies of each image, labels [B]; `threshold` is lambda, `eps` and
    `explore` shape the head weights c (spacte.train.teaching.head_weights). The cosine term is the caller's.
    Source: arXiv 2211.10882, section 3.2.
    """
    return taught_cross_entropy(logits, labels, threshold, eps, explore)
