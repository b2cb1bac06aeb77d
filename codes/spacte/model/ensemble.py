"""How heads are combined, for certify, predict, attack and the accuracies of training.

By the sum of their logits or, for less work, by the consensus of a few of them: the rule stands here once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spacte.utils import RunError


def ensemble_logits(logits: Tensor) -> Tensor:
    """The ensemble's logits, the sum over heads: [L, ..., K] -> [..., K]. Source: arXiv 2211.10882, section 3."""
    return logits.sum(0)


def voters(logits: Tensor) -> Tensor:
    """Who votes: each head and, in the last row, the ensemble: [L, N, K] -> [V, N, K] with V = L + 1.

    One head ([1, N, K], or [N, K]) is its own ensemble: V = 1.
    """
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    return torch.cat([logits, ensemble_logits(logits).unsqueeze(0)]) if len(logits) > 1 else logits


def named_classes(logits: Tensor, num_classes: int) -> Tensor:
    """The class of the largest logit, or K where they are not finite: [..., K] -> [...]. RunError for another K."""
    if logits.shape[-1] != num_classes:
        raise RunError(f"the classifier returned logits of {logits.shape[-1]} classes, not of {num_classes}")
    logits = logits.float()
    largest = torch.linalg.vector_norm(logits, torch.inf, dim=-1)  # of what is not finite: inf or NaN
    return torch.where(largest < torch.inf, logits.argmax(-1), num_classes)


class NetworkEnsemble(nn.Module):
    """All heads of several networks, side by side: images [N, C, H, W] -> logits [L1 + L2 + ..., N, K].

    Their sum is the networks' summed logits: the DNN ensemble of Horvath et al. (ICLR 2022). A network of more heads
    weighs more in it.
    """

    def __init__(self, networks: list[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head of every network."""
        return torch.cat([network(images) for network in self.networks])

    @property
    def members(self) -> int:
        """How many can take part in a consensus: the networks, each with the sum of its own heads."""
        return len(self.networks)

    def early(self, images: Tensor, first: int) -> tuple[Tensor, Tensor, None]:
        """See Consensus."""
        return _own_sums(self.networks[:first], images), images, None

    def late(self, images: Tensor, first: int) -> Tensor:
        """See Consensus."""
        return _own_sums(self.networks[first:], images)


def _own_sums(networks: Iterable[nn.Module], images: Tensor) -> Tensor:
    return torch.stack([ensemble_logits(network(images)) for network in networks])


@dataclass(frozen=True)
class Undecided:
    """Images among which are those that a consensus' first members disagree on: what the other members need of them.

    `features` [M, ...], the first members' logits `early` [first, M, K], the images' places `index` [M] in their
    batch (None: all of it, in its order).
    """

    features: Tensor
    early: Tensor
    index: Tensor | None


class Consensus:
    """The class on which the first members agree, or else the class of all members' summed logits.

    It is a function of the image alone, so every certificate holds for it as for any classifier; the other members see
    only the images that the first ones disagree on. The members are a network's heads, or the networks of an ensemble.
    `classifier` maps images [N, C, H, W] to logits [L, N, K]. The others' work is spared where it has two methods:
    `early(images, first)` returns the first members' logits [first, N, K], features [M, ...] of at least those images
    that `disagree` finds, and their places [M] in the batch (None: of all images); `late(features, first)` returns the
    other members' logits [L - first, M, K]. Source: Horvath et al. (ICLR 2022), section 4, for networks.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], first: int):
        self.first = first
        self._members = classifier if hasattr(classifier, "early") else _AllAtOnce(classifier)
        self.seen = self.disagreed = 0  # images

    def begin(self, images: Tensor) -> tuple[Tensor, Undecided]:
        """The first members' logits [first, N, K], and what `finish` needs. Does not wait for a GPU."""
        early, features, index = self._members.early(images, self.first)
        self.seen += len(images)
        return early, Undecided(features, early if index is None else early[:, index], index)

    def finish(self, batches: list[Undecided]) -> list[tuple[Tensor, Tensor]]:
        """Of each batch the places [n] of the images that the first members disagree on, and the members' summed
        logits there, [n, K]. Waits for the device.
        """
        chosen = [disagree(one.early).nonzero().flatten() for one in batches]
        features = torch.cat([one.features[which] for one, which in zip(batches, chosen, strict=True)])
        logits = torch.cat([one.early[:, which] for one, which in zip(batches, chosen, strict=True)], dim=1)
        if len(features):
            logits = torch.cat([logits, self._members.late(features, self.first)])
        self.disagreed += len(features)
        places = [which if one.index is None else one.index[which] for one, which in zip(batches, chosen, strict=True)]
        return list(zip(places, ensemble_logits(logits).split([len(one) for one in places]), strict=True))


class _AllAtOnce:
    """A classifier whose members' logits are computed together: none of their work is spared."""

    def __init__(self, classifier: Callable[[Tensor], Tensor]):
        self.classifier = classifier

    def early(self, images: Tensor, first: int) -> tuple[Tensor, Tensor, None]:
        """The features are the other members' logits."""
        logits = self.classifier(images)
        if logits.dim() != 3 or len(logits) <= first:
            raise ValueError(f"logits {list(logits.shape)}: a consensus of {first} needs [L, N, K] with more heads")
        return logits[:first], logits[first:].transpose(0, 1), None

    def late(self, features: Tensor, first: int) -> Tensor:
        """See Consensus."""
        return features.transpose(0, 1)


def disagree(logits: Tensor) -> Tensor:
    """Whether the members name different classes: [L, N, K] -> booleans [N]."""
    classes = logits.argmax(-1)
    return (classes != classes[0]).any(0)
