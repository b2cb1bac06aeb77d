"""Self-paced circular teaching: the pace lambda, the sample weights, the head weights.

Functions on tensors; only the head weights are drawn, and agreed on by the processes of torchrun.
Source: arXiv 2211.10882, section 3.2. Heads that pace themselves and a lambda for each class are not in the paper.

A hard sample is not dropped, as in self-paced learning (Kumar et al., NeurIPS 2010): at lambda its weight falls from 1
to (1 + e^-lambda) / 2, and then like e^-loss. Where heads agree, or pace themselves, a loss l weighted in this way has
the gradient of a bounded function,

    phi(l) = l up to lambda, then lambda + (1 + e^-lambda) (u - ln(1 + e^u) + ln 2) with u = l - lambda,

of at most lambda + (1 + e^-lambda) ln 2: no image costs more, however wrong. Where one lambda serves all classes, it
can be cheap to give up a hard class whole. `class_quantiles` prevents that.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from spacte.distributed import all_reduce_mean, broadcast, weighted_by_size
from spacte.utils import UserError


def pace_threshold(epoch: int, epochs: int, num_classes: int, last: float) -> float:
    """lambda(epoch): a smoothed loss of at most this is "easy".

    10^-lambda runs in a straight line from lambda(1) = ln(num_classes), the loss of guessing, at which all samples
    begin, to lambda(epochs) = last; lambda itself falls fastest at first. A run of one epoch has lambda =
    ln(num_classes). Epochs count from 1. Source: the authors' code.
    """
    first = math.log(num_classes)
    progress = (epoch - 1) / (epochs - 1) if epochs > 1 else 0.0
    return -math.log10((1 - progress) * 10**-first + progress * 10**-last)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy averaged over the noise vectors: logits [L, m, B, K], labels [B] -> [L, B]."""
    return cross_entropies(logits, labels).mean(1)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every head on every noisy copy: logits [L, m, B, K], labels [B] -> [L, m, B]."""
    targets = labels.expand(logits.shape[:-1])
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape)


def divergences(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(target || softmax z[h,j,i]), with 0 log 0 = 0: logits z and probabilities [L, m, B, K] -> [L, m, B].

    The targets may be [B, K], the same for every head and noisy copy.
    """
    return F.kl_div(F.log_softmax(logits, -1), targets.expand_as(logits), reduction="none").sum(-1)


PACED_BY = ("neighbour", "self", "none")
EXPLORE = 0.01  # the probability that the favoured head is drawn


@dataclass(frozen=True)
class Pace:
    """How samples are weighted: the threshold lambda, of each class where it is a tensor [K], and who weights them.

    `by` is "neighbour" (head h - 1 weights what head h learns: the paper's ring; one head has none, its weights are 1),
    "self" (each head by its own loss; with one head self-paced learning) or "none" (every weight is 1). `losses` [L, B]
    are the smoothed losses that are compared with lambda, where these are not the ones that are minimised.
    """

    threshold: float | Tensor
    by: str = "neighbour"
    losses: Tensor | None = None

    def threshold_of(self, labels: Tensor) -> float | Tensor:
        """Each sample's lambda: a number for all of them, or [B]."""
        return self.threshold[labels] if isinstance(self.threshold, Tensor) else self.threshold


def received_weights(losses: Tensor, threshold: float | Tensor, by: str = "neighbour") -> Tensor:
    """The weight that head h learns sample i with: [L, B] smoothed losses -> [L, B] in [0, 1], without gradient.

    1 where the head that weights the sample finds it easy (loss <= lambda), otherwise (1 + e^-lambda) / (1 + e^(l -
    lambda)) with the loss l of head h. `by`, one of PACED_BY, says who weights it: in the ring head h - 1, so that row
    h is w[h-1], and head 0 learns from the last; a single head has no neighbour, its weights are 1. `threshold` is
    lambda, [B] where each sample has its own.
    """
    losses = losses.detach()
    if by == "none" or (by == "neighbour" and len(losses) == 1):
        return torch.ones_like(losses)
    judges = losses.roll(1, dims=0) if by == "neighbour" else losses
    # A hard sample's weight is 1 at a loss of 0 and falls like e^-loss: what stays hard loses its pull, and where heads
    # agree no sample costs more than a bound (see above). As a sigmoid no loss, however large, overflows.
    scale = 1 + (torch.exp(-threshold) if isinstance(threshold, Tensor) else math.exp(-threshold))
    hard = (scale * torch.sigmoid(threshold - losses)).clamp(max=1)
    return torch.where(judges <= threshold, 1.0, hard)


def teaching_weights(losses: Tensor, threshold: float | Tensor) -> Tensor:
    """The ring's weights by the head that gives them: row h is w[h], what head h gives its neighbour h + 1, [L, B]."""
    return received_weights(losses, threshold).roll(-1, dims=0)


def class_quantiles(losses: Tensor, labels: Tensor, share: float, num_classes: int) -> Tensor:
    """lambda of each class such that a `share` of its samples is easy: the quantile of its losses over all heads, [K].

    losses [L, n] >= 0 and labels [n]. From a share of 1 on, and for a class without samples, lambda is infinite: every
    sample is easy. A class that is harder than others has a larger lambda, so that none is given up whole.
    """
    found = torch.full((num_classes,), math.inf, dtype=losses.dtype, device=losses.device)
    if share < 1:  # the largest loss measured can be below a new image's
        for k in labels.unique().tolist():
            found[k] = torch.quantile(losses[:, labels == k], share)
    return found


def head_weights(
    head_losses: Tensor, eps: float, explore: float = EXPLORE, generator: Generator | None = None
) -> Tensor:
    """The heads' weights c in the loss: [L] losses -> [L] weights that sum to 1, without gradient.

    The head with the smallest loss gets 1 - eps, each other one eps / (L - 1); with probability `explore` the
    favoured head is drawn uniformly instead, so that none idles. One head has the weight 1. The draws are made on
    `head_losses`'s device (the generator's too) and never wait for it.
    """
    num_heads = len(head_losses)
    if num_heads == 1:
        return torch.ones_like(head_losses)
    device = head_losses.device
    # without `explore` the head that leads early would be favoured for ever, and the others would starve on eps
    drawn = torch.randint(num_heads, (), device=device, generator=generator)
    exploring = torch.rand((), device=device, generator=generator) < explore
    favoured = torch.where(exploring, drawn, head_losses.detach().argmin())
    others = torch.full_like(head_losses, eps / (num_heads - 1))
    return torch.where(torch.arange(num_heads, device=device) == favoured, 1 - eps, others)


@dataclass
class CircularLoss:
    """A circular-teaching loss: `total` and `ce` are scalars, `heads` [L] is each head's CE_h before its weight.

    `sample_weights` [L, B] (w[h-1,i]) and `head_weights` [L] (c) have no gradient; `weighted_mean` weights a further
    loss with both. `easy` is the share of (head, sample) pairs whose smoothed loss is at most lambda.
    """

    total: Tensor
    ce: Tensor
    heads: Tensor
    sample_weights: Tensor
    head_weights: Tensor
    easy: Tensor

    def weighted_mean(self, losses: Tensor) -> Tensor:
        """sum_h c_h mean_i w[h-1,i] losses[h,i]: a further loss of every head and sample, [L, B] -> a scalar."""
        if losses.shape != self.sample_weights.shape:
            wanted = list(self.sample_weights.shape)
            raise UserError(
                f"losses {list(losses.shape)}: they must be [L, B], here {wanted}, one for each head and sample"
            )
        return self.head_weights @ (self.sample_weights * losses).mean(1)


def taught_cross_entropy(
    logits: Tensor, labels: Tensor, threshold: float | Pace, eps: float, explore: float = EXPLORE
) -> CircularLoss:
    """L_ce = sum_h c_h CE_h with CE_h = mean_i w[h-1,i] l[h,i]: logits [L, m, B, K], labels [B]; `total` is `ce`.

    A number as `threshold` is the lambda of the paper's ring. Under torchrun the head weights are those of the whole
    batch, the same in every process.
    """
    pace = threshold if isinstance(threshold, Pace) else Pace(threshold)
    lam = pace.threshold_of(labels)
    losses = smoothed_cross_entropy(logits, labels)  # [L, B]
    paced = losses if pace.losses is None else pace.losses
    weights = received_weights(paced, lam, pace.by)
    heads = (weights * losses).mean(1)
    means = all_reduce_mean(weighted_by_size(heads.detach(), len(labels)))  # of the whole batch
    c = broadcast(head_weights(means, eps, explore))  # one favoured head, not one per process
    ce = c @ heads
    return CircularLoss(ce, ce, heads, weights, c, (paced <= lam).float().mean())
