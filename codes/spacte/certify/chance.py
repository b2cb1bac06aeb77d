"""A few noised images of a split, and whether a classifier tells more of them than chance."""

import math
import warnings

import torch
from scipy.stats import binom
from torch import Tensor

from spacte.data.splits import Split
from spacte.smooth.smooth import Smooth
from spacte.smooth.voters import AllHeads

_UNLIKELY = 0.01


def enough_images(split: Split) -> int:
    """How many images of a split tell what a network does, within seconds: 256, of ImageNet's size 64."""
    return 256 if math.prod(split.spec.shape[1:]) <= 64**2 else 64


def chosen(split: Split, count: int) -> tuple[Tensor, Tensor]:
    """About `count` images [n, C, H, W] from the whole split and their labels [n]; always the same ones."""
    indices = torch.linspace(0, len(split) - 1, min(count, len(split))).long().tolist()
    images, labels = zip(*(split[idx] for idx in indices), strict=True)
    return torch.stack(images), torch.tensor(labels)


def noised(images: Tensor, noise_sd: float) -> Tensor:
    """The images with Gaussian noise, always the same."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return images + noise_sd * noise.to(images.device)


@torch.inference_mode()
def warn_at_chance(smooth: Smooth, split: Split) -> None:
    """Warn where the base classifier is right on no more noised images, from the whole split, than by guessing.

    Guessing always names the commonest class; the share that is right must lie above that by more than chance does
    in one of 100 cases. Nothing is said where so few images could not show it.
    """
    images, labels = chosen(split, enough_images(split))
    images = noised(images, smooth.sigma)
    named = AllHeads(smooth.base_classifier, smooth.num_classes)(images)[-1].cpu()
    count, right = len(labels), int((named == labels).sum())
    chance = max(1 / smooth.num_classes, float(labels.bincount().max()) / count)
    if chance**count < _UNLIKELY and binom.sf(right - 1, count, chance) >= _UNLIKELY:
        warnings.warn(
            f"the classifier is right on {right} of {count} noised images, as guessing would be: is it trained for "
            "this noise, and are the classes in the order of the labels?",
            stacklevel=2,
        )
