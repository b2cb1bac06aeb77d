"""Self-paced circular teaching: the pace lambda, the sample weights, the head weights.

Functions on tensors; only the head weights are drawn, and agreed on by the processes of torchrun.
Source: arXiv 2211.10882, section 3.2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from spacte.distributed import all_reduce_mean, broadcast


def pace_threshold(epoch: int, epochs: int, num_classes: int, last: float) -> float:
    """lambda(epoch): a smoothed loss of at most this is "easy".

    10^-lambda runs in a straight line from lambda(1) = ln(num_classes) to lambda(epochs) = last; a run of one
    epoch has lambda = ln(num_classes). Epochs count from 1.
    """
    first = math.log(num_classes)
    progress = (epoch - 1) / (epochs - 1) if epochs > 1 else 0.0
    return -math.log10((1 - progress) * 10**-first + progress * 10**-last)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy averaged over the noise vectors: logits [L, m, B, K], labels [B] -> [L, B]."""
    heads, noises, batch, _ = logits.shape
    targets = labels.expand(heads, noises, batch)
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return losses.view(heads, noises, batch).mean(1)


def teaching_weights(losses: Tensor, threshold: float) -> Tensor:
    """What each head teaches of each sample: [L, B] smoothed losses -> [L, B] weights in [0, 1], without gradient.

    Row h holds the weights that head h gives its neighbour h + 1: 1 where head h finds the sample easy (loss <=
    threshold), otherwise (1 + e^-lambda) / (1 + e^(loss of h+1 - lambda)). The second is computed as a sigmoid, so
    that no loss, however large, overflows. A single head has no neighbour: its weights are 1.
    """
    losses = losses.detach()
    if len(losses) == 1:
        return torch.ones_like(losses)
    neighbours = losses.roll(-1, dims=0)
    hard = ((1 + math.exp(-threshold)) * torch.sigmoid(threshold - neighbours)).clamp(max=1)
    return torch.where(losses <= threshold, 1.0, hard)


def received_weights(losses: Tensor, threshold: float) -> Tensor:
    """w[h-1, i]: the weight that head h learns sample i with; [L, B] -> [L, B], without gradient."""
    return teaching_weights(losses, threshold).roll(1, dims=0)


def head_weights(head_losses: Tensor, eps: float, explore: float = 0.01, generator: Generator | None = None) -> Tensor:
    """The heads' weights c in the loss: [L] losses -> [L] weights that sum to 1, without gradient.

    The head with the smallest loss gets 1 - eps, each other one eps / (L - 1); with probability `explore` the
    favoured head is drawn uniformly instead, so that none idles. One head has the weight 1. The draws are made on
    `head_losses`'s device (the generator's too) and never wait for it.
    """
    num_heads = len(head_losses)
    if num_heads == 1:
        return torch.ones_like(head_losses)
    device = head_losses.device
    drawn = torch.randint(num_heads, (), device=device, generator=generator)
    exploring = torch.rand((), device=device, generator=generator) < explore
    favoured = torch.where(exploring, drawn, head_losses.detach().argmin())
    others = torch.full_like(head_losses, eps / (num_heads - 1))
    return torch.where(torch.arange(num_heads, device=device) == favoured, 1 - eps, others)


@dataclass
class CircularLoss:
    """A circular-teaching loss: `total` and `ce` are scalars, `heads` [L] is each head's CE_h before its weight.

    `sample_weights` [L, B] (w[h-1,i]) and `head_weights` [L] (c) have no gradient; a term inside the ring is weighted
    with both: `loss.in_ring(term)`. `easy` is the share of (head, sample) pairs whose smoothed loss is at most lambda.
    """

    total: Tensor
    ce: Tensor
    heads: Tensor
    sample_weights: Tensor
    head_weights: Tensor
    easy: Tensor

    def in_ring(self, losses: Tensor) -> Tensor:
        """sum_h c_h mean_i w[h-1,i] losses[h,i]: a further loss of every head and sample, [L, B] -> a scalar."""
        return self.head_weights @ (self.sample_weights * losses).mean(1)


def taught_cross_entropy(logits: Tensor, labels: Tensor, threshold: float, eps: float, explore: float) -> CircularLoss:
    """L_ce = sum_h c_h CE_h with CE_h = mean_i w[h-1,i] l[h,i]: logits [L, m, B, K], labels [B]; `total` is `ce`.

    Under torchrun the head weights are those of the whole batch, the same in every process.
    """
    losses = smoothed_cross_entropy(logits, labels)  # [L, B]
    weights = received_weights(losses, threshold)
    heads = (weights * losses).mean(1)
    c = broadcast(head_weights(all_reduce_mean(heads.detach()), eps, explore))
    ce = c @ heads
    return CircularLoss(ce, ce, heads, weights, c, (losses <= threshold).float().mean())
