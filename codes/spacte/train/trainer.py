"""A classifier in training: steps, epochs, evaluation, state.

A batch of `batch_size` images is split into m mini-batches (or as many as the objective says), each repeated m times
with fresh noise: m optimiser steps of `batch_size` noisy images. Under torchrun each process takes its part of every
mini-batch (DistributedDataParallel); BatchNorm's statistics are then each process's own within an epoch and the main
process's after it.
"""

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck
from tqdm import tqdm

from spacte.data.splits import BatchedSplit
from spacte.device import keep_rng_state, restore_rng_state, rng_state
from spacte.distributed import all_gather_object, broadcast, get_rank, get_world_size, weighted_by_size
from spacte.model.batchnorm import keep_running_statistics
from spacte.model.classifier import Classifier
from spacte.model.ensemble import num_voters
from spacte.model.noisy import noisy_logits
from spacte.provenance import package_versions
from spacte.train.accuracy import count_right, warn_of_lost_classes
from spacte.train.graph import GraphedStep, uncompiled
from spacte.train.meter import LossMeter
from spacte.train.objective import Objective, check_returned, unwrapped
from spacte.train.settings import Recipe
from spacte.train.teaching import Pace, class_quantiles, smoothed_cross_entropy
from spacte.utils import UserError, derived_seed

_IMAGES_OF_A_PACE = 200  # for each class: a share measured on them has a standard error of at most .035
_PART_OF_A_BATCH = 8  # a last batch of less than an eighth is left out of its epoch
_STEPS_BETWEEN_CHECKS = 50  # losses wait on the device this long, so that no step waits for it


class Trainer:
    """A classifier, its optimiser and the data, an epoch at a time.

    On one GPU steps are replayed as CUDA graphs (spacte.train.graph) unless `graphs` is False; those of several
    processes never are.
    """

    def __init__(
        self, recipe: Recipe, objective: Objective, classifier: Classifier, device: torch.device,
        train_split: BatchedSplit, test_split: BatchedSplit, graphs: bool = True,
    ):  # fmt: skip
        self.recipe, self.device, self.objective = recipe, device, objective
        self.train_split, self.test_split = train_split, test_split
        self.mini_batches = objective.mini_batches()
        if self.mini_batches < 1:
            raise UserError(f"{objective.name()}.mini_batches returned {self.mini_batches}: it must be at least 1")
        # fewer images cannot fill the mini-batches, nor give BatchNorm two values to compare
        fewest = max(2, self.mini_batches * objective.fewest_images()) * get_world_size()
        if min(recipe.batch_size, len(train_split)) < fewest:
            raise UserError(
                f"--batch_size {recipe.batch_size} of {len(train_split)} training images: both must be at least "
                f"{fewest}, for {self.mini_batches} mini-batches in each of {get_world_size()} processes"
            )
        # a last batch of few images would be m whole steps, too, after which BatchNorm's statistics are mostly theirs
        self.smallest = min(max(fewest, math.ceil(recipe.batch_size / _PART_OF_A_BATCH)), len(train_split))
        self.steps = train_split.num_batches(recipe.batch_size, self.smallest) * self.mini_batches
        classifier.to(device).to(memory_format=torch.channels_last)
        classifier.precision = recipe.precision
        if recipe.compile:
            _compile(classifier, device)
        self.classifier: nn.Module = classifier
        if get_world_size() > 1:
            warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions; harmless
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.11 has no other name
            self.classifier = DistributedDataParallel(classifier, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(
            classifier.parameters(), recipe.lr_init, momentum=0.9, weight_decay=recipe.wd, foreach=True
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, recipe.lr_step_size, recipe.gamma)
        full = {math.ceil(recipe.batch_size / self.mini_batches), recipe.batch_size // self.mini_batches}
        graphs = graphs and device.type == "cuda" and get_world_size() == 1
        self.graphed = GraphedStep(self.step, full, device, vars(objective)) if graphs else None
        self.epoch = 0  # epochs done
        self.targets: Tensor | None = None  # what the objective needs of each training image beside its label
        self.fingerprint = train_split.fingerprint()
        torch.manual_seed(derived_seed("process", recipe.seed, get_rank()))

    def state(self) -> dict:
        """What a checkpoint holds of the training itself. Every process must call it."""
        return {
            "state_dict": unwrapped(self.classifier).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "data": self.train_split.spec,
            "data_sha256": self.fingerprint,
            "rng": all_gather_object(rng_state(self.device)),
            "versions": package_versions(),
        } | ({"objective": state} if (state := self.objective.state()) else {})

    def restore(self, contents: dict) -> None:
        """Resume from `contents`, which `state` returned. UserError if its data set is another."""
        data = contents["data"], contents.get("data_sha256", self.fingerprint)
        if data != (self.train_split.spec, self.fingerprint):
            raise UserError("the training data in --data_dir differ from those that the run was started on")
        unwrapped(self.classifier).load_state_dict(contents["state_dict"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.scheduler.load_state_dict(contents["scheduler"])
        self.epoch = contents["epoch"]
        self.objective.restore(contents.get("objective", {}))
        states = contents["rng"]
        if len(states) == get_world_size() and self.device.type in states[get_rank()]:
            restore_rng_state(states[get_rank()])
        else:  # other processes or another device: fresh draws, again a function of the seed
            torch.manual_seed(derived_seed("resumed", self.recipe.seed, self.epoch, get_rank()))

    def prepare(self) -> None:
        """Ask the objective for its targets; nothing that this draws moves the training's draws."""
        with keep_rng_state(self.device):
            self.targets = self.objective.targets(self.train_split)
        if self.targets is not None and not isinstance(self.targets, Tensor):
            raise UserError(f"{self.objective.name()}.targets returned a {type(self.targets).__name__}, not a tensor")
        if self.targets is not None and len(self.targets) != len(self.train_split):
            found, images = len(self.targets), len(self.train_split)
            raise UserError(f"{self.objective.name()}.targets returned {found} rows for {images} training images")

    def epochs(self, test_freq: int = 1) -> Iterator[dict]:
        """Train to the last epoch; yields each epoch's figures by name.

        Noisy accuracy is looked at where that `is_due` and is NaN after other epochs.
        """
        total = self.recipe.epochs * self.steps
        silent = True if get_rank() else None  # None: a bar where there is a terminal
        with tqdm(
            total=total,
            initial=self.epoch * self.steps,
            unit="step",
            disable=silent,
            dynamic_ncols=True,
        ) as bar:
            started, first = time.monotonic(), self.epoch
            while self.epoch < self.recipe.epochs:
                with self.graphed.in_stream() if self.graphed else contextlib.nullcontext():
                    row = self._train_epoch(bar)
                if self.graphed:
                    self.graphed.forget()  # the next epoch captures its own
                looks = is_due(self.epoch, test_freq, self.recipe.epochs)
                row |= (
                    self.noisy_accuracy() if looks else self._accuracies([math.nan] * num_voters(self.recipe.num_heads))
                )
                done = (self.epoch - first) / (self.recipe.epochs - first)
                row["left"] = str(timedelta(seconds=round((time.monotonic() - started) * (1 / done - 1))))
                yield row

    def _train_epoch(self, bar: tqdm) -> dict:
        recipe, epoch = self.recipe, self.epoch + 1
        started = time.monotonic()
        with keep_rng_state(self.device):
            weights = self.objective.sampling_weights(epoch, unwrapped(self.classifier), self.train_split)
        self.classifier.train()
        share = self.objective.easy_share(epoch)
        self.objective.class_thresholds = self._class_thresholds(epoch, share, weights) if share < 1 else None
        rates = {"lr": self.scheduler.get_last_lr()[0]}
        if recipe.paced:
            rates["lambda"] = _mean_threshold(self.objective.pace(epoch))
        shown = {name: f"{value:.3g}" for name, value in rates.items()}
        order = torch.Generator().manual_seed(derived_seed("order", recipe.seed, epoch))  # the same in every process
        meter = LossMeter(epoch)
        batches = self.train_split.batches(recipe.batch_size, order, self.smallest, weights, self.targets)
        step = self.graphed or self.step
        for images, labels, *targets in batches:
            for mini_images, mini_labels, *mini_targets in self._split(images, labels, *targets):
                meter.add(step(mini_images, mini_labels, epoch, *mini_targets), len(mini_labels))
                if len(meter.pending) == _STEPS_BETWEEN_CHECKS:
                    meter.flush()
                    bar.set_postfix({"loss": f"{meter.means()['loss']:.3f}"} | shown)
                bar.update()
        meter.flush()
        meter.join_processes()
        self.scheduler.step()
        for buffer in self.classifier.buffers():  # BatchNorm's statistics: every process continues with what is saved
            broadcast(buffer)
        self.epoch = epoch
        means = meter.means()
        bar.set_postfix({"loss": f"{means['loss']:.3f}"} | shown)
        seconds = time.monotonic() - started
        return {"epoch": epoch, **rates, **means, "images_per_second": meter.images / seconds}

    def _split(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A batch's mini-batches: of each tensor the rows that are theirs."""
        for which in range(self.mini_batches):  # every m-th row: the last batch, too, gives all of them some
            yield tuple(one[which :: self.mini_batches] for one in rows)

    @torch.no_grad()
    def _class_thresholds(self, epoch: int, share: float, weights: Tensor | None) -> Tensor:
        """lambda of each class for the epoch, [K]: the `share` quantile of its losses, on noise without an attack.

        Measured before the epoch on mini-batches like the epoch's own: drawn by its sampling `weights`, with BatchNorm
        in training mode. They hold 200 training images per class on average, or all if there are fewer, and are divided
        among the processes. The random numbers of training stay as they would be without. The cost is a third of that
        of as many training steps: for ImageNet a twentieth of an epoch.
        """
        order = torch.Generator().manual_seed(derived_seed("pace", self.recipe.seed, epoch))
        enough = math.ceil(_IMAGES_OF_A_PACE * self.objective.num_classes / self.recipe.batch_size)
        batches = self.train_split.batches(self.recipe.batch_size, order, self.smallest, weights)
        network, found = unwrapped(self.classifier), []
        with keep_rng_state(self.device), uncompiled(), keep_running_statistics(network):
            torch.manual_seed(derived_seed("pace", self.recipe.seed, epoch, get_rank()))
            for images, labels in itertools.islice(batches, enough):
                for mini_images, mini_labels in self._split(images, labels):
                    logits = noisy_logits(network, mini_images, self.objective.draw_noises(mini_images))
                    found.append((smoothed_cross_entropy(logits, mini_labels).cpu(), mini_labels.cpu()))
        everywhere = [one for process in all_gather_object(found) for one in process]
        losses, labels = (torch.cat(parts, -1) for parts in zip(*everywhere, strict=True))
        return class_quantiles(losses, labels, share, self.objective.num_classes).to(self.device)

    def step(self, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor) -> dict[str, Tensor]:
        """One optimiser step on a mini-batch; returns the loss's parts on the device, without waiting for them."""
        loss, parts = check_returned(
            self.objective(self.classifier, images, labels, epoch, *targets), self.objective.name()
        )
        if self.objective.teachers and "distil" not in parts:
            raise UserError(f"{self.objective.name()} does not call `total_loss`: --teachers would teach nothing")
        self.optimizer.zero_grad(set_to_none=True)  # a step whose capture failed may have left some
        weighted_by_size(loss, len(labels)).backward()  # the processes' gradients are averaged
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # gradients would keep the memory of a graph that is gone
        return {name: part.detach() for name, part in {"loss": loss, **parts}.items()}

    def noisy_accuracy(self) -> dict[str, float]:
        """The share of test images, each with one noise vector, that the ensemble (`acc`) and each head get right.

        After the last epoch it warns of classes of which the ensemble gets no image right.
        """
        with keep_rng_state(self.device):  # how often one looks does not change the training
            torch.manual_seed(derived_seed("test", self.recipe.seed, self.epoch, get_rank()))
            right, images = count_right(unwrapped(self.classifier), self.test_split, self.recipe, self.device)
        if self.epoch == self.recipe.epochs:
            warn_of_lost_classes(right, images, self.test_split.spec)
        return self._accuracies((right.sum(1) / len(self.test_split)).tolist())

    def _accuracies(self, shares: list[float]) -> dict[str, float]:
        return {"acc": shares[-1], **{f"acc{h}": share for h, share in enumerate(shares[: self.recipe.num_heads])}}


def _compile(classifier: Classifier, device: torch.device) -> None:
    """Through torch.compile: on the CPU the whole classifier, on a GPU each residual block.

    A GPU has the rest of a step in the CUDA graph around it, and blocks of one shape share what is compiled: seconds
    instead of minutes for R110.
    """
    torch._dynamo.config.recompile_limit = 64  # a mini-batch's sizes, times the modes it runs in
    blocks = [one for one in classifier.modules() if isinstance(one, BasicBlock | Bottleneck)]
    for module in blocks if device.type == "cuda" else [classifier]:
        module.compile(dynamic=False)  # the last batch's size must not make all batches' code dynamic


def _mean_threshold(pace: Pace) -> float:
    """Lambda for the log; of lambdas by class the mean of those that were measured."""
    lam = pace.threshold
    if isinstance(lam, Tensor):
        measured = lam[lam.isfinite()]
        return float(measured.mean()) if len(measured) else math.inf
    return lam


def is_due(epoch: int, every: int, last: int) -> bool:
    """Whether this epoch is the first, the last or a multiple of `every`."""
    return epoch in (1, last) or epoch % every == 0
