"""Certification from Python: any classifier on any data, in one call that leaves the logs of certify_mhead.py."""

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from spacte import cli
from spacte.certify.base import BaseClassifier, Computing, joint_settings, of_callable, of_checkpoints
from spacte.certify.certify import CertifySettings, certify_images, check_stopping, parser_of
from spacte.certify.evaluation import Evaluation, computing_of
from spacte.certify.settings import ClassifierSettings, RunSettings
from spacte.data.indexed import Indexed, read_item
from spacte.data.spec import DataSpec
from spacte.data.splits import Split
from spacte.distributed import init_distributed
from spacte.model.checkpoint import Loaded
from spacte.model.foreign import printable_name
from spacte.utils import UserError

_KINDS = (ClassifierSettings, RunSettings, CertifySettings)
# what the call's own arguments say, or a checkpoint
_NOT_BY_NAME = {"model_path", "classifier", "classifier_args", "normalize", "arch", "dataset", "num_heads", "noise_sd"}


def certify_dataset(
    classifier: Callable | Loaded | list[Loaded], data, *, noise_sd: float | None = None,
    num_classes: int | None = None, dataset: str | None = None, name: str | None = None, **settings,
) -> Path:  # fmt: skip
    """Certify images as certify_mhead.py does; returns the log, beside which counts, configuration and summary lie.

    With probability at least 1 - alpha over the draws for an image, the smoothed classifier is constant within the
    logged L2 radius of it. An interrupted call resumes after its last whole image when it is made again.

    `classifier`: a module or callable, images [N, C, H, W] in [0, 1] -> logits [N, K] or [L, N, K], each image on its
    own (checked first), or what `load_classifier` returned, or a list of these: their ensemble.
    `data`: a torch Dataset whose items are an image and its label, or (images, labels); images [C, H, W] are uint8, or
    floating point in [0, 1].
    `noise_sd` is sigma in units of [0, 1], `num_classes` is K; a checkpoint may know both. `dataset` (default: the
    checkpoint's, or "data") and `name` are what the log's path says:
    <logs_dir>/<dataset>/<arch>/noise-<sd>/certify-mhead/<name>-certify-skip-<k>.log.
    `settings` are flags of certify_mhead.py by name: N0, N, alpha, certificate, skip_wrong, sequential, radii,
    tolerance, give_up, skip, max, shard, logs_dir, overwrite, head, consensus, batch_size, images_per_pass, seed,
    exact_noise, device, precision, compile. Run by torchrun, the processes share the images.

    Raises UserError, before anything is written, with what is legal.
    """
    own, run, certification = _settings(settings)
    init_distributed()
    check_stopping(certification)
    computing = computing_of(own)
    base, split = _base(classifier, data, noise_sd, num_classes, dataset, name, computing)
    evaluation = Evaluation.of(base, split, own, computing, certification.N)
    if own.exact_noise:
        for idx in run.chosen(range(len(split))):
            evaluation.smooth.noise.on_grid(split[idx][0])
    files, _ = certify_images(evaluation, own, run, certification)
    return files.log


def _dataset(data):
    """The data as something that is indexed, item by item. UserError where they are not."""
    legal = "it must be (images, labels), as many of the one as of the other"
    if isinstance(data, tuple):
        try:
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
    legal = {field.name for kind in _KINDS for field in fields(kind)} - _NOT_BY_NAME - {"data_dir"}
    strange = sorted(set(given) - legal)
    if strange:
        raise UserError(f"unknown setting '{strange[0]}': choose from {', '.join(sorted(legal))}")
    given = {name: str(value) if isinstance(value, Path | torch.device) else value for name, value in given.items()}
    values = cli.checked(parser_of(""), given)
    return tuple(kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values}) for kind in _KINDS)


def _base(
    classifier, data, noise_sd: float | None, num_classes: int | None, dataset: str | None, name: str | None,
    computing: Computing,
) -> tuple[BaseClassifier, Split]:  # fmt: skip
    data = _dataset(data)
    if noise_sd is not None:
        noise_sd = cli.checked(parser_of(""), {"noise_sd": noise_sd})["noise_sd"]
    networks = [classifier] if isinstance(classifier, Loaded) else classifier
    if isinstance(networks, list) and networks and all(isinstance(one, Loaded) for one in networks):
        networks = [_at_noise(one, noise_sd) for one in networks]
        joint, spec = joint_settings(networks), networks[0].spec
        for setting, value, known in (
            ("noise_sd", noise_sd, joint["noise_sd"]),
            ("num_classes", num_classes, spec.num_classes),
        ):
            if value not in (None, known):
                raise UserError(f"{setting} {value} contradicts the checkpoint, which has {known}")
        split = Indexed(spec, data, computing.device)
        base = of_checkpoints(networks, split, computing)
        config = base.config | ({} if dataset is None else {"dataset": printable_name(dataset)})
        return replace(base, run_name=printable_name(name or base.run_name), config=config), split
    if not callable(classifier):
        raise UserError(
            f"the classifier is a {type(classifier).__name__}: it must be a module, another callable, or what "
            "load_classifier returned (or a list of these)"
        )
    if noise_sd is None or num_classes is None:
        raise UserError("a classifier of your own does not say its noise_sd and num_classes: give both")
    if not isinstance(num_classes, Integral) or num_classes < 1:
        raise UserError(f"num_classes: {num_classes} must be an integer of at least 1")
    dataset = dataset or "data"
    shape = tuple(read_item(data, 0)[0].shape) if len(data) else ()
    split = Indexed(DataSpec(dataset, shape, num_classes, (0.0,), (1.0,)), data, computing.device)
    kind = getattr(classifier, "__name__", type(classifier).__name__)
    config = {"dataset": printable_name(dataset), "arch": printable_name(kind), "classifier": kind}
    if isinstance(classifier, nn.Module):
        classifier = copy.deepcopy(classifier)  # the caller's stays where it is, in its mode
    return of_callable(classifier, split, noise_sd, printable_name(name or "classifier"), config, computing), split


def _at_noise(network: Loaded, noise_sd: float | None) -> Loaded:
    """The checkpoint, whose sigma is this one if it does not say its own."""
    known = network.settings["noise_sd"]
    return replace(network, settings=network.settings | {"noise_sd": noise_sd if known is None else known})
