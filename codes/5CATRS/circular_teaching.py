"""Circular teaching with confidence-aware training (CAT-RS; base defence: Jeong et al., AAAI 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spacte.train.teaching import EXPLORE, CircularLoss, Pace, cross_entropies, divergences, taught_cross_entropy


@dataclass
class CATRSLoss(CircularLoss):
    """A circular loss whose `total` is `low` + lbd * `high`; `ce` and `heads` serve only the weights and are not in it.

    `mask` is the share of (head, sample) pairs that `high` counts.
    """

    low: Tensor
    high: Tensor
    mask: Tensor


def ct_loss(
    logits: Tensor,
    adversarial_logits: Tensor,
    labels: Tensor,
    soft_votes: Tensor,
    threshold: float | Pace,
    eps: float,
    lbd: float,
    confidence_mask: bool = False,
    drawn: Tensor | None = None,
    explore: float = EXPLORE,
) -> CATRSLoss:
    """low + lbd high with low = sum_h c_h mean_i w[h-1,i] low[h,i], and high the same of mask[h,i] high[h,i].

    low[h,i] is the sum of head h's K[h,i] smallest cross-entropies on the m noised copies, over m; high[h,i] its
    largest KL(soft_votes_i || softmax) on the adversarial noises; mask[h,i] is 1 where K[h,i] = m. K = max(1, `drawn`),
    where drawn [L, B] ~ Binomial(m, p) if it is not given, with p the share of the head's copies that it gets right or,
    with `confidence_mask`, the label's soft vote.

    logits and adversarial_logits [L, m, B, K] of the heads on m noised copies of each image, the second under
    adversarial noise; labels [B], soft_votes [B, K]. The pace is measured on `logits`.
    Source: arXiv 2212.09000; circular teaching: arXiv 2211.10882, section 3.2.
    """
    loss = taught_cross_entropy(logits, labels, threshold, eps, explore)
    copies = logits.shape[1]
    summed = cross_entropies(logits, labels).sort(1).values.cumsum(1)  # [:, k - 1] of the k smallest
    if drawn is None:
        right = (logits.argmax(-1) == labels).float().mean(1)  # [L, B]
        p = soft_votes.gather(1, labels.unsqueeze(1)).T.expand_as(right) if confidence_mask else right
        drawn = torch.binomial(torch.full_like(p, copies), p)
    k = drawn.long().clamp(min=1)
    mask = (k == copies).float()
    low = loss.weighted_mean(summed.gather(1, k.unsqueeze(1) - 1).squeeze(1) / copies)
    high = loss.weighted_mean(mask * divergences(adversarial_logits, soft_votes).amax(1))
    return CATRSLoss(**vars(loss) | {"total": low + lbd * high}, low=low, high=high, mask=mask.mean())
