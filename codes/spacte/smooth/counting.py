"""Who votes for what on a batch of noisy copies, counted on the device, without waiting for it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spacte.model.ensemble import Consensus, Undecided, disagree, named_classes, voters
from spacte.model.passes import FixedPasses

_WAITING_BYTES = 2**30  # of the features of copies that are still to be counted


class VotesOfAll:
    """Each head's votes and, in the last row, the ensemble's. The classifier maps [N, C, H, W] to logits [L, N, K]."""

    def __init__(self, classifier: Callable[[Tensor], Tensor]):
        self.classifier = classifier

    def of(self, images: Tensor, sizes: Sequence[int], num_classes: int) -> Sequence[Tensor]:
        """The votes of each portion of the images: [V, K + 1], the last column for logits that are not finite."""
        return _counted(self.classes(images, num_classes), sizes, num_classes + 1)

    def classes(self, images: Tensor, num_classes: int) -> Tensor:
        """What each head and, last, the ensemble name on each image: [N, C, H, W] -> [V, N]."""
        if isinstance(self.classifier, FixedPasses) and self.classifier.is_graph:
            return self.classifier.classes(images, num_classes)
        return named_classes(voters(self.classifier(images).float()), num_classes)

    def settle(self) -> None:
        """Nothing waits."""


class VotesByConsensus:
    """The votes of a consensus' first members and, in the last row, its own.

    A copy that they disagree on is counted in the last row when `settle` is called, before the votes are read: a GPU is
    waited for only then, and the other members' passes are full.
    """

    def __init__(self, consensus: Consensus):
        self.consensus = consensus
        self._waiting: list[tuple[Undecided, Sequence[int], Tensor]] = []  # with the portions' sizes and votes

    def of(self, images: Tensor, sizes: Sequence[int], num_classes: int) -> Sequence[Tensor]:
        """The votes of each portion of the images: [first + 1, K + 1], see VotesOfAll; complete when settled."""
        early, undecided = self.consensus.begin(images)
        classes = named_classes(early, num_classes)
        waits = num_classes + 1  # a column that is never read
        last = torch.where(disagree(early), waits, classes[0])
        counts = _counted(torch.cat([classes, last.unsqueeze(0)]), sizes, waits + 1)[..., :waits]
        if sum(one.features.nbytes for one, *_ in self._waiting) + undecided.features.nbytes > _WAITING_BYTES:
            self.settle()
        self._waiting.append((undecided, sizes, counts))
        return counts

    def settle(self) -> None:
        """Complete all votes that were returned so far."""
        waiting, self._waiting = self._waiting, []
        decided = self.consensus.finish([undecided for undecided, *_ in waiting]) if waiting else []
        for (_, sizes, counts), (index, logits) in zip(waiting, decided, strict=True):
            portions = torch.searchsorted(torch.tensor(sizes, device=index.device).cumsum(0), index, right=True)
            classes = named_classes(logits, counts.shape[-1] - 1)
            counts[:, -1].index_put_((portions, classes), torch.ones_like(classes), accumulate=True)


def _counted(classes: Tensor, sizes: Sequence[int], columns: int) -> Tensor:
    """How often each class was named in each portion: [V, N] -> [P, V, columns]."""
    counts = classes.new_zeros(len(sizes), len(classes), columns)
    for portion, named in zip(counts, classes.split(list(sizes), dim=1), strict=True):
        portion.scatter_add_(1, named, torch.ones_like(named))
    return counts
