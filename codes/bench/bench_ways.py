"""What the benchmarks measure, the authors' way and ours as functions to call again and again, and how fast they are.

Weights, images and labels are random: speed does not depend on them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench_plain import plain_step, plain_votes
from spacte.data.spec import DataSpec, data_spec
from spacte.data.splits import InMemory
from spacte.model import build_classifier
from spacte.model.classifier import Classifier
from spacte.model.frozen import freeze, scales_of
from spacte.model.noisy import noisy_logits
from spacte.model.pass_size import fastest_pass_size, set_pass_size
from spacte.smooth.smooth import Smooth
from spacte.train.objective import Objective
from spacte.train.settings import Recipe
from spacte.train.teaching import pace_threshold, taught_cross_entropy
from spacte.train.trainer import Trainer

_SIGMA, _NOISES, _EPOCH = 0.25, 2, 50


@dataclass(frozen=True)
class Network:
    """A network of some heads for the images of a data set, of which no file is read."""

    arch: str
    dataset: str
    heads: int

    @property
    def spec(self) -> DataSpec:
        """Of its images."""
        return data_spec(self.dataset)

    def build(self) -> Classifier:
        """A new one, on the CPU."""
        return build_classifier(self.arch, self.dataset, self.heads)


# --- certification: a call counts the votes of a batch ---


def authors_votes(network: Network, batch_size: int, device: torch.device) -> Callable[[], object]:
    """Votes of a batch of noisy copies, the authors' way."""
    classifier, spec = network.build().to(device).eval(), network.spec
    image = torch.rand(spec.shape, device=device)
    return lambda: plain_votes(classifier, image, _SIGMA, batch_size, spec.num_classes)


class OurVotes:
    """Votes of a batch of noisy copies as certify_mhead.py counts them; `frozen` is the network that it runs."""

    def __init__(
        self, network: Network, batch_size: int, device: torch.device, precision: str, compiled: bool = False,
        classifier: nn.Sequential | None = None,
    ):  # fmt: skip
        self.batch_size, self.image = batch_size, torch.rand(network.spec.shape, device=device)
        classifier, images = classifier or network.build(), torch.rand(64, *network.spec.shape)
        scales = scales_of(classifier, images, _SIGMA) if precision == "int8" else None
        self.frozen = freeze(classifier, device, precision, batch_size, compiled, scales)
        set_pass_size(self.frozen, fastest_pass_size(self.frozen, self.image))
        self.smooth = Smooth(self.frozen, network.spec.num_classes, _SIGMA)

    def __call__(self):
        """The votes."""
        return self.smooth.count_votes(self.image, self.batch_size, self.batch_size)


# --- training: a call is an optimiser step ---


class _Gaussian(Objective):
    """The objective of 0Gaussian, which lives outside the library."""

    def __call__(self, classifier, images, labels, epoch):
        noises = self.draw_noises(images)
        logits = noisy_logits(classifier, images, noises)
        loss = taught_cross_entropy(logits, labels, self.pace(epoch), self.recipe.eps)
        return self.total_loss(classifier, loss, logits, images, noises)


def authors_step(network: Network, batch_size: int, device: torch.device) -> Callable[[], object]:
    """A step on `batch_size` noisy images, the authors' way."""
    spec, classifier = network.spec, network.build().to(device).train()
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, foreach=False)
    images = torch.rand(batch_size // _NOISES, *spec.shape, device=device)
    labels = torch.randint(spec.num_classes, (len(images),), device=device)
    threshold = pace_threshold(_EPOCH, Recipe().epochs, spec.num_classes, Recipe().lbdlast)
    return lambda: plain_step(classifier, optimizer, images, labels, _SIGMA, _NOISES, threshold)


class OurStep:
    """A step on `batch_size` noisy images as train.py runs it: on a GPU as a CUDA graph where `graphs`."""

    def __init__(
        self, network: Network, batch_size: int, device: torch.device, precision: str, compiled: bool = False,
        graphs: bool = True,
    ):  # fmt: skip
        spec = network.spec
        images = torch.randint(0, spec.levels + 1, (batch_size // _NOISES, *spec.shape), dtype=torch.uint8)
        split = InMemory(spec, images, torch.randint(spec.num_classes, (len(images),)), device=device)
        recipe = Recipe(
            noise_sd=_SIGMA, num_noise_vec=_NOISES, batch_size=batch_size, num_heads=network.heads,
            precision=precision, compile=compiled,
        )  # fmt: skip
        objective = _Gaussian(recipe, spec.num_classes)
        self.trainer = Trainer(recipe, objective, network.build(), device, split, split, graphs)
        self.trainer.classifier.train()
        self.batch, self.epoch = next(split.batches(len(split))), _EPOCH

    def __call__(self):
        """The losses, on the device."""
        graphed = self.trainer.graphed
        if graphed is None:
            return self.trainer.step(*self.batch, self.epoch)
        with graphed.in_stream():
            return graphed(*self.batch, self.epoch)

    @property
    def captured(self) -> bool:
        """Whether the last step was a CUDA graph's replay."""
        return self.trainer.graphed is not None and bool(self.trainer.graphed.graphs)


# --- how fast ---


def speed(way: Callable, batch_size: int, device: torch.device, seconds: float) -> float:
    """Noisy images per second over about that many seconds; the device is waited for only before and after."""
    once = seconds_of(way, 1, device)
    calls = max(1, round(seconds / once))
    return calls * batch_size / seconds_of(way, calls, device)


def seconds_of(way: Callable, calls: int, device: torch.device) -> float:
    """Seconds that this many calls take until the device has finished them."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        way()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
