"""What a classifier of the user's own must do for its certificates to mean something, checked before a run begins.

Source: the checks that AutoAttack (Croce and Hein, ICML 2020) makes of a model before it attacks it.
"""

import math
import warnings

import torch
from torch import Tensor

from spacte.model.ensemble import voters
from spacte.model.foreign import Foreign
from spacte.utils import UserError

_MOVED = 0.01  # of the logits' spread: more than rounding makes of them


def check_contract(classifier: Foreign, images: Tensor, num_classes: int) -> int:
    """The number of heads L of a classifier that is a function of each image alone, from the noised `images` on.

    Raises UserError that says what to do: where it fails, returns other than finite logits [L, N, K] of the data's
    classes, answers the same batch in two ways, or an image differently in another batch, and where the values of
    heads that are to be summed are probabilities.
    """
    size = classifier.pass_size(images)
    images = images[torch.arange(size * math.ceil(len(images) / size)) % len(images)]  # whole passes: no padding
    with torch.inference_mode():  # as when votes are counted
        logits = classifier(images)
        heads, _, classes = logits.shape
        if classes != num_classes:
            raise UserError(f"the classifier knows {classes} classes, the data have {num_classes}: make them one")
        if not logits.isfinite().all():
            raise UserError(
                "the classifier's logits are not finite on noised images: look where it divides; try --precision fp32"
            )
        if heads > 1 and _look_like_probabilities(logits):
            raise UserError(
                f"the {heads} heads return probabilities, and what is summed over heads is logits: return the values "
                "before softmax (or their logarithms)"
            )
        if _differ(logits, classifier(images)):
            raise UserError(
                "the classifier answers the same images in two ways: switch off what is random in it (dropout, train "
                "mode, noise of its own); a certificate is about a function"
            )
        elsewhere = images.clone()
        elsewhere[1::2] = 1 - images[1::2]
        company, turned = classifier(elsewhere), classifier(images.flip(0)).flip(1)
        if _differ(logits[:, ::2], company[:, ::2]) or _differ(logits, turned):
            raise UserError(
                "the classifier's answer to an image depends on the other images of its batch: take BatchNorm out of "
                "train mode, and normalise each image by itself"
            )
    if not _differ(logits, logits[:, :1].expand_as(logits)):
        warnings.warn("the classifier answers every image alike: are its trained weights loaded?", stacklevel=2)
    return heads


def check_gradient(classifier: torch.nn.Module, images: Tensor) -> None:
    """UserError where no gradient of the logits reaches the images [N, C, H, W], which an attack climbs along."""
    point = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        try:
            logits = classifier(point)
            (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), point)
        except (RuntimeError, UserError):
            gradient = None
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        raise UserError(
            "no gradient of the classifier's logits reaches the images, and an attack needs one: compute them in torch "
            "alone, without no_grad, detach, rounding or argmax"
        )
    if _look_like_probabilities(logits):
        warnings.warn("the classifier returns probabilities: attacks on logits are stronger", stacklevel=2)


def _look_like_probabilities(logits: Tensor) -> bool:
    return logits.shape[-1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-3).all())


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether the logits move by more than rounding, or a voter's class changes that led by more than that."""
    spread = one.max() - one.min()
    if (one - other).abs().max() > _MOVED * spread:
        return True
    votes, others = voters(one), voters(other).argmax(-1, keepdim=True)
    lead = votes.amax(-1, keepdim=True) - votes.gather(-1, others)
    return bool((lead > 1e-4 * spread).any())
