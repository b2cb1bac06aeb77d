"""Circular teaching with MACER's radius loss (base defence: Zhai et al., ICLR 2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtri

from spacte.train.teaching import EXPLORE, CircularLoss, Pace, taught_cross_entropy


@dataclass
class MACERLoss(CircularLoss):
    """A circular loss whose `total` is `cl` + lbd * `rl`; `ce` and `heads` serve only the weights and are not in it."""

    cl: Tensor
    rl: Tensor


def ct_loss(
    logits: Tensor,
    labels: Tensor,
    threshold: float | Pace,
    eps: float,
    noise_sd: float,
    lbd: float,
    beta: float,
    margin: float,
    explore: float = EXPLORE,
) -> MACERLoss:
    """cl + lbd rl with cl = sum_h c_h mean_i w[h-1,i] CL[h,i], and rl the same of RL.

    CL = -log(q_y + 1e-10) with q[h,i] = mean_j softmax z[h,j,i]; RL as in `radius_losses`. logits z [L, m, B, K] of the
    heads on m noised copies of each image, labels [B]; noise_sd is sigma. The sample weights w and the head weights c
    come from the mean cross-entropy of the same logits, as for every base.
    Source: arXiv 2001.02378; circular teaching: arXiv 2211.10882, section 3.2.
    """
    loss = taught_cross_entropy(logits, labels, threshold, eps, explore)
    of_label = labels.expand(len(logits), -1).unsqueeze(-1)  # [L, B, 1]
    cl = -(logits.softmax(-1).mean(1).gather(-1, of_label).squeeze(-1) + 1e-10).log()  # [L, B]
    cl, rl = loss.weighted_mean(cl), loss.weighted_mean(radius_losses(logits, labels, noise_sd, beta, margin))
    return MACERLoss(**vars(loss) | {"total": cl + lbd * rl}, cl=cl, rl=rl)


def radius_losses(logits: Tensor, labels: Tensor, noise_sd: float, beta: float, margin: float) -> Tensor:
    """RL[h,i] = sigma/2 (margin - xi) where xi <= margin and the soft vote is right, else 0: [L, m, B, K] -> [L, B].

    sigma/2 xi is the soft radius: xi = Phi^-1(a) - Phi^-1(b) >= 0 of the two largest entries a >= b of mean_j
    softmax(beta z), with gradient through both. An image whose xi is not finite stays out of the graph.
    """
    top, classes = (beta * logits).softmax(-1).mean(1).topk(2)  # [L, B, 2]
    with torch.no_grad():
        xi = ndtri(top[..., 0]) - ndtri(top[..., 1])
        kept = (classes[..., 0] == labels) & (xi <= margin)  # an infinite xi is beyond every margin
    a, b = (torch.where(kept, entry, 0.5) for entry in top.unbind(-1))
    return noise_sd / 2 * torch.where(kept, margin - (ndtri(a) - ndtri(b)), 0.0)
