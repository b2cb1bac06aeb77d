"""A look at noisy test images during training: how many each head and the ensemble get right, class by class."""

import contextlib
import math
import warnings

import torch

from spacte.data.splits import BatchedSplit
from spacte.distributed import all_reduce_mean, get_world_size, is_main_process
from spacte.model.classifier import Classifier
from spacte.model.ensemble import with_ensemble
from spacte.train.graph import uncompiled
from spacte.train.settings import Recipe
from spacte.utils import listed

_PIXELS = 2**21  # of a batch on a GPU: 2,048 images of CIFAR-10


class Look:
    """How many test images [K] there are of each class, and how many of them the V voters get right, [V, K].

    Each image has one noise vector, of torch's default generator. The images are divided among torchrun's processes;
    every one must look, and all know the same. The classifier is left in eval mode.
    """

    @torch.no_grad()
    def __init__(self, classifier: Classifier, split: BatchedSplit, recipe: Recipe, device: torch.device):
        self.split, on_gpu, batch_size = split, device.type == "cuda", recipe.batch_size
        if on_gpu:  # nothing is captured here: few large batches are few launches
            batch_size = max(batch_size, _PIXELS // math.prod(split.spec.shape[1:]))
        classifier.eval()
        voters, classes = recipe.num_heads + (recipe.num_heads > 1), split.spec.num_classes
        counts = torch.zeros(voters + 1, classes, device=device)  # in the last row the images
        with uncompiled() if on_gpu else contextlib.nullcontext():
            for images, labels in split.batches(batch_size):
                noise = torch.randn(images.shape, device=device) * recipe.noise_sd
                named = with_ensemble(classifier(images + noise).float()).argmax(-1)  # [V, B]
                counts.index_add_(1, labels, torch.cat([named == labels, labels.ge(0).unsqueeze(0)]).float())
        counts = all_reduce_mean(counts) * get_world_size()
        self.right, self.images = counts[:-1], counts[-1]

    def accuracies(self) -> list[float]:
        """The share that each head and, last, the ensemble get right; one head is the ensemble."""
        return (self.right.sum(1) / len(self.split)).tolist()

    def warn_of_classes(self) -> None:
        """Warn of the classes of which the ensemble gets no image right."""
        given_up = ((self.right[-1] == 0) & (self.images > 0)).nonzero().flatten().tolist()
        if given_up and is_main_process():
            names = self.split.spec.class_names
            classes = listed(f"{k} ({names[k]})" if names else k for k in given_up)
            warnings.warn(f"no noisy test image is right of class {classes}: given up in training?", stacklevel=2)
