"""Circular teaching on adversarial images under noise (base defence: Salman et al., NeurIPS 2019)."""

from torch import Tensor

from spacte.train.teaching import EXPLORE, CircularLoss, Pace, taught_cross_entropy


def ct_loss(
    logits: Tensor, labels: Tensor, threshold: float | Pace, eps: float, explore: float = EXPLORE
) -> CircularLoss:
    """L_ce = sum_h c_h mean_i w[h-1,i] l[h,i] at the adversarial images; `total` is `ce`.

    logits [L, m, B, K] of the heads on m noised copies of each adversarial image, labels [B]. The loss is the mean of
    the copies' cross-entropies also where the attack averaged their predictions. Lambda is compared with the losses
    there, unless `threshold` is a Pace with `losses` of its own.
    Source: arXiv 1906.04584; circular teaching: arXiv 2211.10882, section 3.2.
    """
    return taught_cross_entropy(logits, labels, threshold, eps, explore)
