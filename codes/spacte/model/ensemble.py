"""How heads are combined, for certify, predict, attack and the accuracies of training: by the sum of their logits."""

from functools import reduce

import torch
from torch import Tensor

from spacte.utils import RunError


def ensemble_logits(logits: Tensor) -> Tensor:
    """The ensemble's logits, the sum over heads: [L, ..., K] -> [..., K]. Source: arXiv 2211.10882, section 3.

    Head by head: `Tensor.sum` adds in an order that depends on an image's place in the batch, so that of two classes
    that nearly tie either could win, and the votes would not be those of one function.
    """
    return reduce(torch.add, logits)


def with_ensemble(logits: Tensor) -> Tensor:
    """The logits of each head and, in the last row, the ensemble's: [L, N, K] -> [V, N, K] with V = L + 1.

    One head ([1, N, K], or [N, K]) is its own ensemble: V = 1.
    """
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    return torch.cat([logits, ensemble_logits(logits).unsqueeze(0)]) if len(logits) > 1 else logits


def num_voters(num_heads: int) -> int:
    """V, the heads and the ensemble; one head is its own ensemble."""
    return num_heads + 1 if num_heads > 1 else 1


def named_classes(logits: Tensor, num_classes: int) -> Tensor:
    """The class of the largest logit, or K where they are not finite: [..., K] -> [...]. RunError for another K."""
    if logits.shape[-1] != num_classes:
        raise RunError(f"the classifier returned logits of {logits.shape[-1]} classes, not of {num_classes}")
    logits = logits.float()
    largest = torch.linalg.vector_norm(logits, torch.inf, dim=-1)  # of what is not finite: inf or NaN
    return torch.where(largest < torch.inf, logits.argmax(-1), num_classes)


def classes_of_all(logits: Tensor, num_classes: int) -> Tensor:
    """What each head and, in the last row, the ensemble name: [L, N, K], or [N, K] of one head, -> [V, N].

    K stands where logits are not finite, see `named_classes`.
    """
    return named_classes(with_ensemble(logits.float()), num_classes)
