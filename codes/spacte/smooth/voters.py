"""Who votes: voters are callables from noisy images [N, C, H, W] to the classes that they name, [V, N]."""

from collections.abc import Callable

import torch
from torch import Tensor

from spacte.model.ensemble import classes_of_all, ensemble_logits, named_classes
from spacte.model.members import HasMembers
from spacte.model.passes import FixedPasses
from spacte.utils import UserError


class AllHeads:
    """Each head and, in the last row, the ensemble, by the sum of their logits; one head is its own ensemble.

    `classifier` maps images [N, C, H, W] to logits [L, N, K], or [N, K] of one head.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], num_classes: int):
        self.classifier, self.num_classes = classifier, num_classes

    def __call__(self, images: Tensor) -> Tensor:
        """The classes named, [V, N]; K where logits are not finite."""
        if isinstance(self.classifier, FixedPasses):
            return self.classifier.classes(images, self.num_classes)
        return classes_of_all(_logits(self.classifier, images), self.num_classes)


def _logits(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """UserError if they are not logits of these images."""
    logits = classifier(images)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.shape[-2] != len(images):
        found = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        wanted = "logits [N, K], or [heads, N, K], of N images"
        raise UserError(f"the classifier returned {found} for {len(images)} images: it must return {wanted}")
    return logits


class Consensus:
    """The first members and, in the last row, the class on which they agree, else that of all members' summed logits.

    It is a function of the image alone, so every certificate holds for it as for any classifier; the other members see
    only the images that the first ones disagree on. The members are a network's heads, or the networks of an ensemble,
    each with the sum of its own heads. The others' work is spared where the `classifier`, images [N, C, H, W] -> logits
    [L, N, K], computes by members (spacte.model.members).
    Source: Horvath et al. (ICLR 2022), section 4, for networks.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], num_classes: int, first: int):
        if isinstance(classifier, HasMembers) and first >= classifier.members:
            raise ValueError(f"a consensus of {first} needs more members than {classifier.members}")
        self.classifier, self.num_classes, self.first = classifier, num_classes, first

    def __call__(self, images: Tensor) -> Tensor:
        """The classes named, [first + 1, N]; K where logits are not finite. Waits for the device once."""
        if isinstance(self.classifier, HasMembers):
            early, features = self.classifier.first_logits(images, self.first)
            undecided = disagree(early.argmax(-1)).nonzero().flatten()
            late = early[:0, undecided]
            if len(undecided):
                late = self.classifier.other_logits(features[undecided], self.first)
        else:
            logits = _logits(self.classifier, images)
            if logits.dim() != 3 or len(logits) <= self.first:
                shape, wanted = list(logits.shape), "[L, N, K] with more heads"
                raise ValueError(f"logits {shape}: a consensus of {self.first} needs {wanted}")
            early = logits[: self.first]
            undecided = disagree(early.argmax(-1)).nonzero().flatten()
            late = logits[self.first :, undecided]
        classes = named_classes(early, self.num_classes)
        decided = ensemble_logits(torch.cat([early[:, undecided], late]))
        last = classes[0].index_copy(0, undecided, named_classes(decided, self.num_classes))
        return torch.cat([classes, last.unsqueeze(0)])


def disagree(classes: Tensor) -> Tensor:
    """Whether the voters name different classes: [V, N] -> booleans [N]."""
    return (classes != classes[:1]).any(0)
