"""Certification from Python: any classifier on any data, in one call that leaves the logs of certify_mhead.py."""

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from spacte import cli
from spacte.certify.base_classifier import (
    BaseClassifier,
    ComputeSettings,
    base_from_callable,
    base_from_checkpoints,
    joint_config,
)
from spacte.certify.certify import CertifySettings, certify_images, check_stopping, parser_of
from spacte.certify.loading import compute_settings, evaluation_of
from spacte.certify.run_settings import RunSettings
from spacte.certify.settings import ClassifierSettings
from spacte.data.indexed import UserSplit, read_item
from spacte.data.spec import DataSpec
from spacte.device import torch_defaults
from spacte.distributed import init_distributed
from spacte.logs.config import RunConfig
from spacte.model.checkpoint import LoadedClassifier
from spacte.model.classifier import Classifier
from spacte.model.modes import restore_mode_and_device
from spacte.names import printable_name
from spacte.precision import keep_arithmetic_settings
from spacte.smooth.noise import GridNoise
from spacte.utils import UserError

_TURN = threading.RLock()  # held during a call: torch's settings and a module's mode are shared by all threads


def _begin_turns_again() -> None:
    """Called after a fork: the thread that had the turn does not exist in the new process."""
    global _TURN
    _TURN = threading.RLock()


os.register_at_fork(after_in_child=_begin_turns_again)
_KINDS = (ClassifierSettings, RunSettings, CertifySettings)
# flags that are not accepted: the call's own arguments, or a checkpoint, say these
_NOT_BY_NAME = {
    "model_path", "classifier", "classifier_args", "normalize", "arch", "dataset", "data_dir", "num_heads", "noise_sd",
}  # fmt: skip


def certify_dataset(
    classifier: Callable | LoadedClassifier | list[LoadedClassifier], data: Any, *, noise_sd: float | None = None,
    num_classes: int | None = None, levels: int | None = None, dataset: str | None = None, name: str | None = None,
    **settings: Any,
) -> Path:  # fmt: skip
    """Certify images as certify_mhead.py does; returns the log, beside which counts, configuration and summary lie.

    With probability at least 1 - alpha over the draws for an image, the smoothed classifier is constant within the
    logged L2 radius of it. An interrupted call resumes after its last whole image when it is made again.

    `classifier`: a module or callable, images [N, C, H, W] -> logits [N, K] or [L, N, K], each image on its own (a spot
    check comes first), or what `load_classifier` returned, or a list of these: their ensemble. A module gets its mode
    and device back, and torch's settings of precision stay the caller's; calls in other threads wait for their
    turn, so that a classifier must not wait for such a call.
    `data`: a torch Dataset whose items are an image and its label, or (images, labels). Images are uint8, which become
    value / `levels` (255, or what the checkpoint says), or floating point; those of a checkpoint are [C, H, W] in
    [0, 1]. Another classifier's may have any shape and range (signals [S], embeddings, rows of a table): sigma and
    radii are then in their units, and the guarantee is about what is given: for an embedding, about changes of the
    embedding, not of the text that it was computed from.
    `noise_sd` is sigma, `num_classes` is K; a checkpoint may know both, and be certified at another sigma.
    `exact_noise` asks that all values are multiples of 1 / `levels`.
    `dataset` (default: the checkpoint's, or "data") and `name` are what the log's path says:
    <logs_dir>/<dataset>/<arch>/noise-<sd>/certify-mhead/<name>-certify-skip-<k>.log.
    `settings` are flags of certify_mhead.py by name: N0, N, alpha, certificate, skip_wrong, sequential, radii,
    tolerance, give_up, skip, max, shard, logs_dir, overwrite, head, consensus, batch_size, images_per_pass, seed,
    exact_noise, device, precision, compile. Run by torchrun, the processes share the images.

    Raises UserError, before anything is written, with what is legal.
    """
    networks = classifier if isinstance(classifier, list) else [classifier]
    loaded = [one for one in networks if isinstance(one, LoadedClassifier)]
    own, run, certification = _settings(settings)
    if noise_sd is not None:
        noise_sd = cli.parse_value("noise_sd", noise_sd, cli.image_norm if loaded else cli.positive_float)
        own = replace(own, noise_sd=noise_sd)
    init_distributed()
    check_stopping(certification)
    with _TURN, restore_mode_and_device(classifier), keep_arithmetic_settings():
        computing, data = compute_settings(own, certification.N), _dataset(data)
        if loaded and len(loaded) == len(networks):
            base, split = _from_checkpoints(loaded, data, noise_sd, num_classes, levels, dataset, computing)
        else:
            base, split = _from_callable(classifier, data, noise_sd, num_classes, levels, dataset, computing)
        base = replace(base, run_name=printable_name(name or base.run_name))
        evaluation = evaluation_of(base, split, own, computing)
        _warn_of_range(split)
        if isinstance(evaluation.smooth.noise, GridNoise):
            for idx in run.chosen(range(len(split))):
                evaluation.smooth.noise.check(split[idx][0])
        files, _ = certify_images(evaluation, own, run, certification)
    return files.log


def _warn_of_range(split: UserSplit) -> None:
    """Warn where pictures, all of which have been read, lie outside [0, 1]."""
    low, high = split.range
    if len(split.spec.shape) == 3 and not 0 <= low <= high <= 1:
        warnings.warn(
            f"the images have values from {low:.3g} to {high:.3g}: sigma and radii are in these units; where they are "
            "pictures that were normalised, normalise in the classifier, after the noise",
            stacklevel=3,
        )


@torch_defaults()
def _dataset(data: Any) -> Any:
    """The data as something that is indexed, item by item. UserError if they are not."""
    legal = "it must be (images, labels), two tensors or arrays of one length; other items are given as a list of pairs"
    if isinstance(data, tuple):
        try:
            data = tuple(one.to_numpy() if hasattr(one, "to_numpy") else one for one in data)  # pandas' have an index
            data = TensorDataset(*map(torch.as_tensor, data))
        except (TypeError, ValueError, RuntimeError, AssertionError, IndexError):
            raise UserError(f"the data are a tuple: {legal}") from None
        if len(data.tensors) != 2:
            raise UserError(f"the data are a tuple: {legal}")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise UserError(
            f"the data are a {type(data).__name__}: they must be a Dataset with a length, whose items are an image and "
            "its label, or (images, labels)"
        )
    return data


def _settings(given: dict) -> tuple[ClassifierSettings, RunSettings, CertifySettings]:
    """The settings as the flags of these names would hold them."""
    legal = {field.name for kind in _KINDS for field in fields(kind)} - _NOT_BY_NAME
    strange = sorted(set(given) - legal)
    if strange:
        raise UserError(f"unknown setting '{strange[0]}': choose from {', '.join(sorted(legal))}")
    given = {name: str(value) if isinstance(value, Path | torch.device) else value for name, value in given.items()}
    values = cli.check_settings(parser_of(""), given)
    own, run, certification = (
        {one.name: values[one.name] for one in fields(kind) if one.name in values} for kind in _KINDS
    )
    return ClassifierSettings(**own), RunSettings(**run), CertifySettings(**certification)


def _from_checkpoints(
    networks: list[LoadedClassifier], data: Any, noise_sd: float | None, num_classes: int | None, levels: int | None,
    dataset: str | None, computing: ComputeSettings,
) -> tuple[BaseClassifier, UserSplit]:  # fmt: skip
    """UserError if the networks do not belong together, or know another number of classes or levels."""
    if noise_sd is not None:  # else each is evaluated at training's
        networks = [replace(one, noise_sd=noise_sd) for one in networks]
    config, spec = joint_config(networks), networks[0].spec
    if dataset is not None:
        config = replace(config, dataset=printable_name(dataset))
    for what, value, own in (("num_classes", num_classes, spec.num_classes), ("levels", levels, spec.levels)):
        if value not in (None, own):
            raise UserError(f"{what} {value} contradicts the checkpoint, which has {own}")
    split = UserSplit(spec, data, computing.device)
    return base_from_checkpoints(networks, config, split, computing), split


def _from_callable(
    function: Any, data: Any, noise_sd: float | None, num_classes: int | None, levels: int | None,
    dataset: str | None, computing: ComputeSettings,
) -> tuple[BaseClassifier, UserSplit]:  # fmt: skip
    """UserError if `function` is not callable, noise_sd or num_classes is missing, or a number is not legal."""
    if not callable(function):
        raise UserError(
            f"the classifier is a {type(function).__name__}: it must be a module, another callable, or what "
            "load_classifier returned (or a list of these)"
        )
    if noise_sd is None or num_classes is None:
        raise UserError("a classifier of your own does not say its noise_sd and num_classes: give both")
    levels = 255 if levels is None else levels
    for what, value in (("num_classes", num_classes), ("levels", levels)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise UserError(f"{what}: {value} must be an integer of at least 1")
    dataset = dataset or "data"
    first = read_item(data, 0)[0] if len(data) else torch.empty(0)
    spec = DataSpec(dataset, tuple(first.shape), num_classes, (0.0,), (1.0,), levels)
    split = UserSplit(spec, data, computing.device, any_range=True)
    kind = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, Classifier):  # of a checkpoint: what it was called before it had a class of its own
        kind = "Sequential"
    config = RunConfig(dataset=printable_name(dataset), arch=printable_name(kind), noise_sd=noise_sd, classifier=kind)
    return base_from_callable(function, split, "classifier", config, computing), split
