"""What a classifier of the user's own must do for its certificates to mean something, checked before a run begins.

Source: the checks that AutoAttack (Croce and Hein, ICML 2020) makes of a model before it attacks it.
"""

import math
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from spacte.device import memory_is_short
from spacte.model.ensemble import with_ensemble
from spacte.model.foreign import ForeignClassifier
from spacte.utils import UserError, failure

# by how much rounding may change logits, as a share of their spread: of an image that moved within the batch, and of
# one that did not, whose sums run in the same order
_FINE, _COARSE = (1e-3, 1e-4), (1e-2, 1e-3)  # fp32; tf32 and bf16


def check_contract(classifier: ForeignClassifier, images: Tensor, num_classes: int) -> Tensor:
    """Check that a classifier is a function of each image alone; returns its logits [L, N, K] on N noised `images`.

    A spot check: what these images do not show (a rarer dependence on other images, or one on time) is for the user to
    ensure. A classifier that overwrites its input gets copies from then on. Raises UserError that says what to do if
    the classifier fails; does not return finite logits [L, N, K] of the data's classes; answers the same batch in two
    ways, at once or after other batches; answers an image differently beside other images or in another place of the
    batch; or has several heads that return probabilities, since what is summed over heads is logits.
    """
    size, count = classifier.pass_size(images), len(images)
    images = images[torch.arange(size * math.ceil(len(images) / size)) % len(images)]  # whole passes: no padding
    moved, in_place = _FINE if classifier.precision == "fp32" else _COARSE
    with torch.no_grad():  # as when votes are counted
        given = images.clone()
        logits = classifier(given)
        if not torch.equal(given, images):
            classifier.copies = True
        heads, _, classes = logits.shape
        if classes != num_classes:
            raise UserError(f"the classifier knows {classes} classes, the data have {num_classes}: make the two agree")
        if not logits.isfinite().all():
            raise UserError(
                "the classifier's logits are not finite on noised images: look where it divides; try --precision fp32"
            )
        if heads > 1 and _look_like_probabilities(logits):
            raise UserError(
                f"the {heads} heads return probabilities, and what is summed over heads is logits: return the values "
                "before softmax (or their logarithms)"
            )
        others = classifier(_beside_other_images(images))
        if _differ(logits[:, ::2], others[:, ::2], in_place):
            _refuse(classifier, images, logits, in_place, "it changes beside other images")
        copies = classifier(images[:1].expand_as(images).contiguous())  # as in certification
        if _differ(logits[:, :1], copies[:, :1], in_place):
            _refuse(classifier, images, logits, in_place, "it changes in a batch of its copies")
        if _differ(logits, classifier(images.flip(0)).flip(1), moved):
            _refuse(classifier, images, logits, in_place, "it changes with its position in the batch")
        if _differ(logits, classifier(images), in_place):
            _refuse(classifier, images, logits, in_place, None)
    if not _differ(logits, logits[:, :1].expand_as(logits), moved):
        warnings.warn("the classifier answers every image alike: are its trained weights loaded?", stacklevel=2)
    return logits[:, :count]


def answers(logits: Tensor) -> tuple[float, ...]:
    """What tells the classifier from another one with the same parameters: three numbers for each image.

    Each is a sum of an image's logits (of [L, N, K]) with fixed random signs, divided by the root mean square over the
    images of the logits' norm: about 1 in size.
    """
    of_each = logits.transpose(0, 1).flatten(1).double().cpu()  # [N, L K]
    drawn = torch.randint(0, 2, (of_each.shape[1], 3), device="cpu", generator=torch.Generator().manual_seed(0))
    signs = drawn.double() * 2 - 1
    found = of_each @ signs / of_each.square().sum(1).mean().sqrt().clamp(min=1e-30)
    return tuple(round(value, 4) for value in found.flatten().tolist())


SPOT_CHECK_IMAGES = 32
SPOT_CHECK = (
    f"spot check passed on {SPOT_CHECK_IMAGES} noised images: answers did not change when repeated, reordered or "
    "batched with others; "
    "that each depends on its image alone everywhere is for you to ensure"
)
_DEPENDS = (
    "the classifier's answer to an image depends on the other images of its batch: take BatchNorm out of train mode, "
    "and normalise, quantise and attend within each image alone ({})"
)


def _refuse(
    classifier: ForeignClassifier, images: Tensor, logits: Tensor, rounding: float, reason: str | None
) -> NoReturn:
    """UserError that says why the classifier's answers differ from `logits`.

    It gives `reason`, a dependence on the rest of the batch, only if `images` themselves still get `logits`. Otherwise
    the classifier is random or keeps a state.
    """
    again, once_more = classifier(images), classifier(images)
    if _differ(again, once_more, rounding):
        raise UserError(
            "the classifier gives two different answers for the same images: switch off what is random in it "
            "(dropout, train mode, noise of its own); a certificate is about a function"
        )
    if _differ(logits, again, rounding) or reason is None:
        raise UserError(
            "the classifier answers the same images in another way after it has seen others: it keeps a state (running "
            "statistics, observers of a quantisation, a counter); freeze it before certification"
        )
    raise UserError(_DEPENDS.format(reason))


def _beside_other_images(images: Tensor) -> Tensor:
    """The batch [N, C, H, W] with others in every second place: mirrored, zeros, three times as bright, or a copy."""
    changed = images.clone()
    for number, other in enumerate((1 - images, torch.zeros_like(images), 3 * images, images[:1].expand_as(images))):
        changed[1 + 2 * number :: 8] = other[1 + 2 * number :: 8]
    return changed


def check_gradient(classifier: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """UserError if no gradient of the logits reaches the images [N, C, H, W], which an attack climbs along."""
    point, cause = images.detach().clone().requires_grad_(), None
    with torch.enable_grad():
        try:
            logits = classifier(point)
            (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), point)
        except (RuntimeError, UserError) as error:
            if memory_is_short(error):
                raise
            gradient, cause = None, error
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        raise UserError(
            "no gradient of the classifier's logits reaches the images, and an attack needs one: compute them in torch "
            f"alone, without no_grad, detach, rounding or argmax{f' ({failure(cause)})' if cause else ''}"
        ) from cause
    if _look_like_probabilities(logits):
        warnings.warn("the classifier returns probabilities: attacks on logits are stronger", stacklevel=2)


def _look_like_probabilities(logits: Tensor) -> bool:
    return logits.shape[-1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-3).all())


def _differ(one: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether logits [L, N, K] move by more than this share of their spread, or a class changes that led by as much."""
    spread = one.max() - one.min()
    if (one - other).abs().max() > rounding * spread:
        return True
    votes, others = with_ensemble(one), with_ensemble(other).argmax(-1, keepdim=True)
    lead = votes.amax(-1, keepdim=True) - votes.gather(-1, others)
    return bool((lead > 1e-4 * spread).any())
