"""Accuracy on noisy test images during training, class by class."""

import contextlib
import math
import warnings

import torch
from torch import Tensor

from spacte.data.spec import DataSpec
from spacte.data.splits import BatchedSplit
from spacte.distributed import all_reduce_mean, get_world_size, is_main_process
from spacte.model.classifier import Classifier
from spacte.model.ensemble import num_voters, with_ensemble
from spacte.train.graph import uncompiled
from spacte.train.settings import Recipe
from spacte.utils import listed

_PIXELS = 2**21  # of a batch on a GPU: 2,048 images of CIFAR-10


@torch.no_grad()
def count_right(
    classifier: Classifier, split: BatchedSplit, recipe: Recipe, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How many test images of each class the V voters get right, [V, K], and how many there are, [K].

    The voters are the heads and, in the last row, the ensemble. Each image has one noise vector, of torch's default
    generator. torchrun's processes share the images and all return the same: every one must call it. The classifier is
    left in eval mode.
    """
    on_gpu, batch_size = device.type == "cuda", recipe.batch_size
    if on_gpu:  # nothing is captured here: few large batches are few launches
        batch_size = max(batch_size, _PIXELS // math.prod(split.spec.shape[1:]))
    classifier.eval()
    counts = torch.zeros(num_voters(recipe.num_heads) + 1, split.spec.num_classes, device=device)  # images: last row
    with uncompiled() if on_gpu else contextlib.nullcontext():
        for images, labels in split.batches(batch_size):
            noise = torch.randn(images.shape, device=device) * recipe.noise_sd
            right = with_ensemble(classifier(images + noise).float()).argmax(-1) == labels  # [V, B]
            counts.index_add_(1, labels, torch.cat([right, torch.ones_like(right[:1])]).float())
    counts = all_reduce_mean(counts) * get_world_size()
    return counts[:-1], counts[-1]


def warn_of_lost_classes(right: Tensor, images: Tensor, spec: DataSpec) -> None:
    """Warn of the classes of which the ensemble gets no image right; `right` and `images` as of `count_right`."""
    lost = ((right[-1] == 0) & (images > 0)).nonzero().flatten().tolist()
    if lost and is_main_process():
        names = spec.class_names
        classes = listed(f"{k} ({names[k]})" if names else k for k in lost)
        warnings.warn(f"no noisy test image is right of class {classes}: given up in training?", stacklevel=2)
