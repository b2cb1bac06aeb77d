"""A few noised images of a split, and whether a classifier tells more of them than chance."""

import math
import warnings

import torch
from scipy.special import bdtrc

from spacte.data.splits import Split
from spacte.model.noisy import with_fixed_noise
from spacte.model.passes import fixed_pass_modules
from spacte.smooth.smooth import Smooth
from spacte.smooth.voters import AllHeads

_UNLIKELY = 0.01


@torch.no_grad()
def warn_at_chance(smooth: Smooth, split: Split) -> None:
    """Warn where the base classifier is right on no more noised images, from the whole split, than by guessing.

    Guessing always names the commonest class; the share that is right must lie above that by more than chance does
    in one of 100 cases. Nothing is said where so few images could not show it.
    """
    enough = 256 if math.prod(split.spec.shape[1:]) <= 64**2 else 64  # to tell within seconds
    images, labels = split.evenly_spaced(enough)
    images = with_fixed_noise(images, smooth.sigma)
    named = AllHeads(smooth.base_classifier, smooth.num_classes)(images)[-1].cpu()
    if smooth.consensus is not None:  # whose heads vote in other functions
        for one in fixed_pass_modules(smooth.base_classifier):
            one.forget_functions()
    count, right = len(labels), int((named == labels).sum())
    chance = max(1 / smooth.num_classes, float(labels.bincount().max()) / count)
    if chance**count < _UNLIKELY and bdtrc(right - 1, count, chance) >= _UNLIKELY:
        warnings.warn(
            f"the classifier is right on {right} of {count} noised images, as guessing would be: is it trained for "
            "this noise, and are the classes in the order of the labels?",
            stacklevel=2,
        )
