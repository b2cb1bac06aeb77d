"""Circular teaching with SmoothMix's mixed images (base defence: Jeong et al., NeurIPS 2021)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spacte.model.noisy import noisy_logits
from spacte.train.teaching import EXPLORE, CircularLoss, Pace, taught_cross_entropy


@dataclass
class SmoothMixLoss(CircularLoss):
    """A circular loss whose `total` is `ce`; the caller adds `mix` with its weight.

    `logits` [L, m, B, K] are the clean side's.
    """

    mix: Tensor
    logits: Tensor


def ct_loss(
    classifier,
    clean: Tensor,
    adversary: Tensor,
    noises: Tensor,
    labels: Tensor,
    threshold: float | Pace,
    eps: float,
    uniform: Tensor | None = None,
    explore: float = EXPLORE,
) -> SmoothMixLoss:
    """L_ce on the clean side and L_mix = sum_h c_h mean_i w[h-1,i] mean_j KL(target_i || softmax z_h(x_mix,i + noise)).

    classifier: [N, C, H, W] -> [L, N, K]; clean and adversary [B, C, H, W] in [0, 1]; noises [m, B, C, H, W];
    labels [B]. x_mix = (1-u) clean + u adversary and target = (1-u) p + u / K, where p [B, K] is the heads' mean
    prediction on the clean side, weighted with c, with gradient, and u = uniform / 2 with `uniform` [B] from U(0, 1)
    (drawn where not given).
    Source: arXiv 2211.10882, section 3.2; arXiv 2111.09277, section 3.
    """
    logits = noisy_logits(classifier, clean, noises)  # [L, m, B, K]
    loss = taught_cross_entropy(logits, labels, threshold, eps, explore)
    prediction = torch.einsum("h,hbk->bk", loss.head_weights, logits.softmax(-1).mean(1))

    if uniform is None:
        uniform = torch.rand(len(labels), device=clean.device)
    u = uniform / 2
    target = (1 - u).unsqueeze(1) * prediction + u.unsqueeze(1) / logits.shape[-1]  # [B, K]
    target = target.clamp(min=1e-20)  # where u and p both underflow, log target stays finite
    u = u.view(-1, 1, 1, 1)
    mixed = noisy_logits(classifier, (1 - u) * clean + u * adversary, noises)
    divergence = F.kl_div(F.log_softmax(mixed, -1).mean(1), target.expand(len(mixed), -1, -1), reduction="none").sum(-1)
    return SmoothMixLoss(**vars(loss), mix=loss.weighted_mean(divergence), logits=logits)
