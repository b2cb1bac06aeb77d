"""Circular teaching with consistency regularisation (base defence: Jeong and Shin, NeurIPS 2020)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from spacte.train.teaching import EXPLORE, CircularLoss, Pace, taught_cross_entropy


@dataclass
class ConsistencyLoss(CircularLoss):
    """A circular loss whose `total` is `ce` + `consistency`."""

    consistency: Tensor


def ct_loss(
    logits: Tensor,
    labels: Tensor,
    threshold: float | Pace,
    eps: float,
    lbd: float,
    eta: float,
    mean_grad: bool | None = None,
    explore: float = EXPLORE,
) -> ConsistencyLoss:
    """L_ce + L_con with L_con = sum_h c_h mean_i w[h-1,i] (lbd mean_j KL(p[h,i] || p[h,j,i]) + eta H(p[h,i])).

    logits [L, m, B, K] of the heads on m noised copies of each image, labels [B]; p[h,i] is the mean over the copies
    of p[h,j,i] = softmax(logits). `mean_grad` says whether gradient flows through that mean: as in the authors'
    code not for several heads, as in the base defence for one (None chooses so).
    Source: arXiv 2211.10882, section 3.2; arXiv 2006.04062, equation 7.
    """
    loss = taught_cross_entropy(logits, labels, threshold, eps, explore)
    log_probabilities = F.log_softmax(logits, dim=-1)  # [L, m, B, K]
    mean = log_probabilities.exp().mean(1)  # [L, B, K]
    if not (len(logits) == 1 if mean_grad is None else mean_grad):
        mean = mean.detach()
    log_mean = mean.clamp(min=1e-20).log()
    divergence = (mean * (log_mean - log_probabilities.mean(1))).sum(-1)  # mean_j KL, [L, B]
    entropy = -(mean * log_mean).sum(-1)  # [L, B]
    consistency = loss.weighted_mean(lbd * divergence + eta * entropy)
    return ConsistencyLoss(**vars(loss) | {"total": loss.ce + consistency}, consistency=consistency)
