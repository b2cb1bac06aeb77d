"""How heads are combined, for certify, predict, attack and the accuracies of training.

By the sum of their logits or, for less work, by the consensus of a few of them: the rule stands here once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Staged = tuple[Tensor, Tensor, Tensor]  # see Consensus


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


class NetworkEnsemble(nn.Module):
    """All heads of several networks, side by side: images [N, C, H, W] -> logits [L1 + L2 + ..., N, K].

    Their sum is the networks' summed logits: the DNN ensemble of Horvath et al. (ICLR 2022).
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

    def staged(self, images: Tensor, first: int, needs_all: Callable[[Tensor], Tensor]) -> Staged:
        """See Consensus."""
        early = torch.stack([ensemble_logits(network(images)) for network in self.networks[:first]])
        index = needs_all(early).nonzero().flatten()
        if not len(index):
            return early, index, early[:, :0]
        rest = images[index]
        return early, index, torch.stack([ensemble_logits(network(rest)) for network in self.networks[first:]])


class Consensus(nn.Module):
    """f_K: the class on which the first K members agree, or else the class of all members' summed logits.

    It is a function of the image alone, so every certificate holds for it as for any classifier; the other members see
    only the images that the first ones disagree on. The members are a network's heads, or the networks of an ensemble.
    `classifier` maps images [N, C, H, W] to logits [L, N, K]. Where it has a method `staged(images, first, needs_all)`
    the others' work is spared: it returns the first members' logits [first, N, K], the index [n] of the images for
    which `needs_all` of these is true, and the other members' logits on them, [L - first, n, K].
    Source: Horvath et al. (ICLR 2022), section 4, for networks.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], first: int):
        super().__init__()
        self.classifier, self.first = classifier, first
        self.seen = self.disagreed = 0  # images

    def forward(self, images: Tensor) -> Tensor:
        """Who votes, by their largest logit: the first K members and, last, the consensus: [K + 1, N, classes].

        The consensus's row holds the first member's logits where all K agree.
        """
        early, index, others = self._staged(images)
        self.seen, self.disagreed = self.seen + len(images), self.disagreed + len(index)
        consensus = early[0].clone()
        consensus[index] = ensemble_logits(torch.cat([early[:, index], others]))
        return torch.cat([early, consensus.unsqueeze(0)])

    def _staged(self, images: Tensor) -> Staged:
        if hasattr(self.classifier, "staged"):
            return self.classifier.staged(images, self.first, disagree)
        logits = self.classifier(images)
        early = logits[: self.first]
        index = disagree(early).nonzero().flatten()
        return early, index, logits[self.first :, index]


def disagree(logits: Tensor) -> Tensor:
    """Whether the members name different classes: [L, N, K] -> booleans [N]."""
    classes = logits.argmax(-1)
    return (classes != classes[0]).any(0)
