"""Circular teaching with stability training (base defence: Li et al., NeurIPS 2019)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from spacte.train.teaching import EXPLORE, CircularLoss, Pace, taught_cross_entropy


@dataclass
class StabilityLoss(CircularLoss):
    """A circular loss, whose `ce` is that of the clean images; `total` is `ce` + lbd * `stability`."""

    stability: Tensor


def ct_loss(
    clean: Tensor,
    noisy: Tensor,
    labels: Tensor,
    threshold: float | Pace,
    eps: float,
    lbd: float,
    explore: float = EXPLORE,
) -> StabilityLoss:
    """L_ce on the clean images + lbd sum_h c_h mean_i w[h-1,i] mean_j H(softmax clean[h,i], softmax noisy[h,j,i]).

    H(p, q) = -sum_k p_k log q_k; gradient flows through both of its sides. Logits clean [L, B, K] of the images
    themselves and noisy [L, m, B, K] of m noised copies of each, labels [B]. The pace is measured on the clean images.
    Source: arXiv 1809.03113; circular teaching: arXiv 2211.10882, section 3.2.
    """
    loss = taught_cross_entropy(clean.unsqueeze(1), labels, threshold, eps, explore)
    log_noisy = F.log_softmax(noisy, -1).mean(1)  # [L, B, K]
    stability = loss.weighted_mean(-(clean.softmax(-1) * log_noisy).sum(-1))
    return StabilityLoss(**vars(loss) | {"total": loss.ce + lbd * stability}, stability=stability)
