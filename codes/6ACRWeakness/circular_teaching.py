"""Circular teaching on noise that is moved adversarially (base defence: Sun et al., ICML 2025)."""

from torch import Tensor

from spacte.train.teaching import EXPLORE, CircularLoss, Pace, taught_cross_entropy


def ct_loss(
    logits: Tensor, labels: Tensor, threshold: float | Pace, eps: float, explore: float = EXPLORE
) -> CircularLoss:
    """L_ce = sum_h c_h mean_i w[h-1,i] l[h,i] under the noise that the attack returned; `total` is `ce`.

    logits [L, m, B, K] of the heads on m noised copies of each image, labels [B]. Lambda is compared with the losses
    there, unless `threshold` is a Pace with `losses` of its own.
    Source: arXiv 2410.06895; circular teaching: arXiv 2211.10882, section 3.2.
    """
    return taught_cross_entropy(logits, labels, threshold, eps, explore)
