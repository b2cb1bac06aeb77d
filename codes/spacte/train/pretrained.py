"""Trained networks that a training takes something from: what teachers predict, and a trunk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spacte.data.spec import DataSpec
from spacte.files import sha256
from spacte.model import checkpoint, checkpoint_file
from spacte.model.classifier import Classifier
from spacte.train.settings import Recipe
from spacte.train.teaching import divergences
from spacte.utils import UserError


class Teachers:
    """Trained networks, which stay as they are: head h learns the prediction of the h-th, one head that of their mean.

    A network's prediction is the mean softmax of its heads. Raises UserError, which names the file, where one is no
    readable checkpoint or of other data than `spec`.
    """

    def __init__(self, recipe: Recipe, spec: DataSpec, device: torch.device):
        self.networks = [_loaded(path, recipe, spec).classifier.to(device) for path in recipe.teachers]
        for network in self.networks:
            network.to(memory_format=torch.channels_last).requires_grad_(False)
            network.precision = recipe.precision
        self.mean = recipe.num_heads == 1

    @torch.no_grad()
    def predictions(self, images: Tensor) -> Tensor:
        """What each head is to learn of images [N, C, H, W]: probabilities [L, N, K], without gradient."""
        every = torch.stack([network(images).float().softmax(-1).mean(0) for network in self.networks])
        return every.mean(0, keepdim=True) if self.mean else every

    def divergences(self, logits: Tensor, images: Tensor, noises: Tensor) -> Tensor:
        """mean_j KL(teacher || softmax z[h,j,i]) on the noisy copies that the heads' logits z [L, m, B, K] are of.

        images [B, C, H, W], noises [m, B, C, H, W] -> [L, B]; 0 where a head predicts what its teacher does.
        """
        taught = self.predictions((images + noises).flatten(0, 1)).unflatten(1, noises.shape[:2])  # [L, m, B, K]
        return divergences(logits, taught).mean(1)


def take_trunk(classifier: Classifier, path: str, recipe: Recipe, spec: DataSpec) -> None:
    """Give the classifier the trunk of a trained network, which the training leaves as it is."""
    loaded = _loaded(path, recipe, spec)
    if (loaded.spec.mean, loaded.spec.std) != (spec.mean, spec.std):
        raise UserError(
            f"--frozen_trunk '{path}' normalises by {loaded.spec.mean} and {loaded.spec.std}, the "
            f"network here by {spec.mean} and {spec.std}"
        )
    if loaded.arch != recipe.arch:
        raise UserError(f"--frozen_trunk '{path}' is of {loaded.arch}, the network here of {recipe.arch}")
    trunk = {
        key: value for key, value in loaded.classifier.network.state_dict().items() if not key.startswith("heads.")
    }
    classifier.network.load_state_dict(trunk, strict=False)
    classifier.network.freeze_trunk()


def inputs_sha256(files: Mapping[str, Sequence[str | Path]]) -> dict[str, list[str]]:
    """The hashes of the files that a training takes something from (`Objective.files`), by the setting that names them.

    UserError if one cannot be read.
    """
    for name, paths in files.items():
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"--{name}: there is no checkpoint '{path}'")
    return {name: [sha256(Path(path)) for path in paths] for name, paths in files.items()}


def _loaded(name: str, recipe: Recipe, spec: DataSpec) -> checkpoint.LoadedClassifier:
    """The network of a checkpoint. UserError if it is not of the training's data."""
    path, contents = Path(name), checkpoint_file.read(name)
    if not contents["args"]:
        raise UserError(f"'{path}' is not a checkpoint of train.py: it does not say its architecture")
    loaded = checkpoint.classifier_from_contents(contents, path, dataset=recipe.dataset)
    there, here = ((tuple(one.shape), one.num_classes, one.class_names) for one in (loaded.spec, spec))
    if there != here:
        raise UserError(f"'{path}' was trained on other images or classes than the run: {there} there, {here} here")
    return loaded
