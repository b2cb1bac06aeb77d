"""What the base defences' training objectives share. A defence is a subclass of `Objective` in its own folder."""

import math
from argparse import _ArgumentGroup
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spacte.data.splits import BatchedSplit
from spacte.model.batchnorm import keep_running_statistics
from spacte.model.classifier import Classifier
from spacte.model.noisy import noisy_logits
from spacte.train.pretrained import Teachers
from spacte.train.settings import Recipe
from spacte.train.teaching import CircularLoss, Pace, pace_threshold, smoothed_cross_entropy
from spacte.utils import UserError, listed

_TEACHERS_WEIGHT = 0.5


@dataclass
class Objective:
    """A base defence: called with (classifier, images, labels, epoch), returns the loss and a dict of its named parts.

    images [B, C, H, W] in [0, 1], labels [B], epoch from 1; the loss and every part are scalars on their device. A
    subclass is a dataclass: its own fields are its settings, each set by the flag of that name from `add_flags`.

    A defence that looks at the training split has three more hooks, each of which does nothing here: `targets` before
    the training, `sampling_weights` before each epoch, and `state` with `restore` for what a resumed run must know.
    """

    # the settings that say where something is stored: a resumed run may change them
    places: ClassVar[tuple[str, ...]] = ()
    # those that name a checkpoint which the training takes something from: a resumed run may find it elsewhere
    inputs: ClassVar[tuple[str, ...]] = ()

    recipe: Recipe
    num_classes: int

    teachers: Teachers | None = field(default=None, init=False)  # set where there are some
    class_thresholds: Tensor | None = field(default=None, init=False)  # --pace_share: lambda [K], set before an epoch

    @classmethod
    def name(cls) -> str:
        """What tables call the defence."""
        return cls.__name__

    @staticmethod
    def add_flags(parser: _ArgumentGroup) -> None:
        """Add the flags that only this defence has to its group of flags, as to a parser."""

    @classmethod
    def own_defaults(cls) -> dict:
        """The settings that only this defence has, with their defaults. UserError if one has none."""
        own = [one for one in fields(cls) if one.init and one.name not in ("recipe", "num_classes")]
        for one in own:
            if one.default is MISSING and one.default_factory is MISSING:
                raise UserError(f"{cls.__name__}.{one.name} has no default: every setting needs one")
        return {one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in own}

    def input_files(self) -> dict[str, tuple[str | Path, ...]]:
        """The checkpoints that the training takes something from, by setting: the recipe's and the defence's own."""
        found = dict[str, tuple[str | Path, ...]]()
        for owner in (self.recipe, self):
            for name in owner.inputs:
                paths = getattr(owner, name) or ()
                found[name] = (paths,) if isinstance(paths, str | Path) else tuple(paths)
        return {name: paths for name, paths in found.items() if paths}

    def run_suffix(self) -> str:
        """What the run's name says of this defence's settings, after the recipe's."""
        return ""

    def mini_batches(self) -> int:
        """Into how many mini-batches a batch is split, an optimiser step each: m, so that a step sees `batch_size`
        noisy images.
        """
        return self.recipe.num_noise_vec

    def fewest_images(self) -> int:
        """How many images a mini-batch must have in each process. One is enough where its m >= 2 noisy copies pass the
        network together: BatchNorm compares at least two values.
        """
        return 1

    def targets(self, split: BatchedSplit) -> Tensor | None:
        """What the loss needs of each training image beside its label, [n, ...]: the rows of a mini-batch's images are
        then the fifth argument of the call. Called once, in every process, before training.
        """

    def sampling_weights(self, epoch: int, classifier: Classifier, split: BatchedSplit) -> Tensor | None:
        """Weights [n] >= 0 in proportion to which the epoch draws n training images, with replacement.

        An image of weight 0 is left out; None draws each image once. Called before every epoch, in every process, all
        of which must return the same: what it draws must be a function of the seed, the epoch and the image.
        """

    def state(self) -> dict:
        """What a checkpoint holds of the objective: tensors, numbers, strings."""
        return {}

    def restore(self, state: dict) -> None:
        """Resume from `state`. UserError if the settings contradict it."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and its parts by name; see the class."""
        raise NotImplementedError

    def pace(self, epoch: int) -> Pace:
        """The pace of the epoch, for the loss.

        With --pace_share each class has its own lambda, infinite until it has been measured. Where nothing is paced,
        lambda is infinite, too.
        """
        recipe = self.recipe
        if not recipe.paced:
            return Pace(math.inf, "none")
        if recipe.pace_share is not None:
            return Pace(math.inf if self.class_thresholds is None else self.class_thresholds, recipe.paced_by)
        return Pace(pace_threshold(epoch, recipe.epochs, self.num_classes, recipe.lbdlast), recipe.paced_by)

    def pace_from_noise(
        self, epoch: int, classifier: nn.Module, images: Tensor, labels: Tensor, noises: Tensor
    ) -> Pace:
        """`pace` for a loss on other inputs than plain noisy copies: attacked ones, say.

        With --pace_share the losses on plain noisy copies still decide which samples are easy, because lambda was
        measured on these. They cost a further forward pass of images [B, C, H, W] + noises [m, B, C, H, W], without
        gradient, which leaves BatchNorm's running statistics alone.
        """
        if self.recipe.pace_share is None:
            return self.pace(epoch)
        with torch.no_grad(), keep_running_statistics(unwrapped(classifier)):
            logits = noisy_logits(unwrapped(classifier), images, noises)
        return self.pace_from_logits(epoch, logits, labels)

    def pace_from_logits(self, epoch: int, logits: Tensor, labels: Tensor) -> Pace:
        """The same where the logits [L, m, B, K] on plain noisy copies have been computed already."""
        pace = self.pace(epoch)
        if self.recipe.pace_share is None:
            return pace
        return replace(pace, losses=smoothed_cross_entropy(logits.detach(), labels))

    def easy_share(self, epoch: int) -> float:
        """q(epoch): the share of each class's samples to be easy, falling linearly from 1 to --pace_share."""
        last, epochs = self.recipe.pace_share, self.recipe.epochs
        if last is None:
            return 1.0
        return 1 - (1 - last) * (epoch - 1) / (epochs - 1)

    def total_loss(
        self,
        classifier: nn.Module,
        loss: CircularLoss,
        logits: Tensor,
        images: Tensor,
        noises: Tensor,
        /,
        **parts: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a call returns: `loss.total` with what every defence adds to it, and all parts by name, for the log.

        Added are "cos", L_cos, and with --teachers "distil": 1/2 sum_h c_h mean_ij KL(teacher || head h) on the noisy
        copies that the heads' `logits` [L, m, B, K] are of, images [B, C, H, W] plus noises [m, B, C, H, W]. The sample
        weights do not apply there: a teacher helps most where the neighbour finds a sample hard. `parts` are the
        defence's own; they are logged, not added. UserError if one has the name of another part.
        """
        added = {"cos": self.cosine_loss(classifier)}
        if self.teachers:
            divergences = self.teachers.divergences(logits, images, noises)
            added["distil"] = _TEACHERS_WEIGHT * loss.head_weights @ divergences.mean(1)
        heads = {f"head{h}": head for h, head in enumerate(loss.heads)}
        taken = parts.keys() & {"ce", "cos", "distil", "weight", "easy", *heads}
        if taken:
            raise UserError(
                f"{self.name()} calls a part of its loss '{min(taken)}', as every defence does: take another"
            )
        loss_dict = {"ce": loss.ce, **added, **parts, "weight": loss.sample_weights.mean(), "easy": loss.easy, **heads}
        return loss.total + sum(added.values()), loss_dict

    def cosine_loss(self, classifier: nn.Module) -> Tensor:
        """L_cos of the classifier's network, a scalar; 0 with --no_cosine."""
        if self.recipe.no_cosine:
            return torch.zeros((), device=next(classifier.parameters()).device)
        return unwrapped(classifier).network.cosine_loss()

    def draw_noises(self, images: Tensor) -> Tensor:
        """m Gaussian noise vectors per image, with deviation noise_sd: [B, C, H, W] -> [m, B, C, H, W]."""
        shape = (self.recipe.num_noise_vec, *images.shape)
        return torch.randn(shape, device=images.device) * self.recipe.noise_sd


def unwrapped(classifier: nn.Module) -> Classifier:
    """The classifier itself, without DistributedDataParallel around it."""
    return cast(Classifier, getattr(classifier, "module", classifier))


_OF_AN_EPOCH = ("epoch", "loss", "lr", "lambda", "images_per_second", "left")  # columns of the log


def check_returned(returned: Any, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """What an objective returned. UserError if that is no scalar with its named parts, or a part has a taken name."""
    loss, parts = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    scalars = [loss, *parts.values()] if isinstance(parts, dict) else [None]
    if not all(isinstance(one, Tensor) and not one.dim() for one in scalars):
        raise UserError(f"{name} must return a scalar tensor and a dict of scalar tensors, not {_kind(returned)}")
    taken = [part for part in cast(dict, parts) if part in _OF_AN_EPOCH or part.startswith("acc")]
    if taken:
        raise UserError(f"{name} calls a part of its loss '{taken[0]}', as a column of the log is called: take another")
    return loss, cast(dict, parts)


def _kind(value: Any) -> str:
    """What a value is, for a message: a tensor with its shape, a tuple or dict with what it holds."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}" if value.dim() else "a scalar tensor"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    if isinstance(value, dict):
        return (
            f"a dict of {listed(f'{name}: {_kind(one)}' for name, one in value.items())}" if value else "an empty dict"
        )
    return f"a {type(value).__name__}"
