"""The classifier under the noise: of checkpoints, or of the user's own function; and what a log must say of it."""

import itertools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from spacte.certify.contract import SPOT_CHECK_IMAGES, answers, check_contract
from spacte.data.splits import Split
from spacte.device import default_batch_size
from spacte.distributed import is_main_process, on_main_process
from spacte.logs.config import RunConfig
from spacte.model.checkpoint import LoadedClassifier
from spacte.model.foreign import ForeignClassifier
from spacte.model.frozen import freeze, scales_of
from spacte.model.identity import parameters_sha256
from spacte.model.members import NetworkEnsemble
from spacte.model.noisy import with_fixed_noise
from spacte.model.recognition import check_normalisation
from spacte.model.scales import SCALE_IMAGES, Scales
from spacte.names import printable_name
from spacte.precision import arithmetic
from spacte.utils import UserError


@dataclass(frozen=True)
class ComputeSettings:
    """Where and how networks run: `batch_size_flag` is the requested batch size, `draws` how many noisy copies of an
    image estimate its votes, `arithmetic` the settings that the precision stands for (spacte.precision).
    """

    device: torch.device
    precision: str
    batch_size_flag: int | None
    compiled: bool
    draws: int
    arithmetic: dict[str, bool | str]

    def batch_size(self, split: Split) -> int:
        """How many noisy copies of the split's images a batch has: as many as requested, else `default_batch_size`."""
        return self.batch_size_flag or default_batch_size(self.device, split.spec.shape, self.draws)


@dataclass(frozen=True)
class BaseClassifier:
    """A classifier [N, C, H, W] -> [L, N, K] on its device, its run's name, and its part of the configuration.

    `training` holds the settings that each checkpoint was trained with.
    """

    network: nn.Module
    run_name: str
    config: RunConfig
    training: list[dict[str, Any] | None]


# --- checkpoints ---


def joint_config(networks: list[LoadedClassifier]) -> RunConfig:
    """What one checkpoint, or several that belong together, say of a configuration; architectures and heads may differ.

    Raises UserError if they do not, or one does not say its noise_sd.
    """
    first = networks[0]
    if any(network.noise_sd is None for network in networks):
        raise UserError("the checkpoint does not say its noise_sd: give --noise_sd")
    for name in ("dataset", "noise_sd"):
        values = {getattr(network, name) for network in networks}
        if len(values) > 1:
            found = ", ".join(sorted(map(str, values)))
            raise UserError(f"the checkpoints' {name} differ: {found}; give one --{name} for all")
    for network in networks:
        if (network.spec.shape, network.spec.class_names) != (first.spec.shape, first.spec.class_names):
            raise UserError("the checkpoints were trained on different images or classes")
    return RunConfig(
        dataset=first.dataset,
        arch=_joint_name([network.arch for network in networks], repeats=False),
        num_heads=tuple(network.num_heads for network in networks),
        noise_sd=cast(float, first.noise_sd),
        defence=_joint_name([one.defence for one in networks if one.defence], repeats=False) or None,
    )


def base_from_checkpoints(
    networks: list[LoadedClassifier],
    config: RunConfig,
    split: Split,
    computing: ComputeSettings,
    open_training: Callable[[], Split] | None = None,
) -> BaseClassifier:
    """One checkpoint's network or the ensemble of several, made fast by `freeze`; `config` is their `joint_config`.

    `open_training` is asked for the training images where int8 needs them. Raises UserError if a network has changed
    since it was loaded; if a published one, judged by the images of the split, is not the network that was trained; or
    if int8 has no images to measure its scales on.
    """
    for network in networks:
        network.check_unchanged()
    networks = [_with_normalisation(network, split, config.noise_sd) for network in networks]
    batch_size = computing.batch_size(split)
    int8 = computing.precision == "int8"
    scales = _scales(networks, config.noise_sd, open_training) if int8 else []
    frozen = [
        freeze(network.classifier, computing.device, computing.precision, batch_size, computing.compiled, own)
        for network, own in itertools.zip_longest(networks, scales)
    ]
    published = any(network.published for network in networks)
    config = replace(
        config,
        checkpoint_sha256=tuple(network.file_sha256 for network in networks),
        normalize=tuple(network.normalize for network in networks) if published else None,
        scales_sha256=tuple(one.sha256 for one in scales) if int8 else None,
    )
    base = frozen[0] if len(frozen) == 1 else NetworkEnsemble(frozen)
    training = [network.training for network in networks]
    return BaseClassifier(base, _run_name(networks, training, config.noise_sd), config, training)


def _run_name(networks: list[LoadedClassifier], training: list[dict | None], noise_sd: float) -> str:
    """The name of the networks' runs, with the sigma of their training where it is not `noise_sd`; also prints that."""
    name = _joint_name([network.run for network in networks])
    trained = sorted({one["noise_sd"] for one in training if one and "noise_sd" in one} - {noise_sd})
    if trained and is_main_process():
        noises = " and ".join(f"{sigma:g}" for sigma in trained)
        print(f"trained with noise {noises}, certified with {noise_sd:g}", file=sys.stderr)
    return printable_name(name + f"-trained-at-{'+'.join(f'{sigma:g}' for sigma in trained)}" * bool(trained))


def _scales(
    networks: list[LoadedClassifier], noise_sd: float, open_training: Callable[[], Split] | None
) -> list[Scales]:
    """The int8 scales of each network: those that its file holds for this noise, or measured ones."""

    def measured() -> list[Scales]:
        """The main process measures for all."""
        held = [one.scales if one.scales and one.scales.noise_sd == noise_sd else None for one in networks]
        if all(held):
            return cast(list[Scales], held)
        if open_training is None:
            raise UserError(
                f"precision int8 needs scales at noise_sd {noise_sd:g}: give loaded.with_scales(training_images, "
                f"{noise_sd:g}), or load a file of release.py --int8"
            )
        try:
            images, _ = open_training().evenly_spaced(SCALE_IMAGES)
        except UserError as error:
            raise UserError(
                f"--precision int8 measures scales at noise_sd {noise_sd:g} on training images, unless the checkpoint "
                f"holds them (release.py --int8): {error}"
            ) from error
        started = time.monotonic()
        found = [
            own or scales_of(network.classifier, images, noise_sd) for own, network in zip(held, networks, strict=True)
        ]
        seconds = time.monotonic() - started
        print(f"int8: scales from {len(images)} noised training images, {seconds:.0f} s", file=sys.stderr)
        return found

    return on_main_process(measured)


def _with_normalisation(network: LoadedClassifier, split: Split, noise_sd: float) -> LoadedClassifier:
    """The network; a published one behind the normalisation with which, its BatchNorms say, it was trained."""
    if not network.published:
        return network
    images, _ = split.evenly_spaced(256)
    try:
        name, line = check_normalisation(network.classifier.network, network.normalize, network.spec, images, noise_sd)
    except UserError as error:
        raise UserError(f"'{network.path}': {error}") from error
    if line and is_main_process():
        print(f"'{network.path}': {line}", file=sys.stderr)
    return network if network.normalize else network.normalised_by(name)


def _joint_name(names: list[str], repeats: bool = True) -> str:
    """`a` for one, `a+b` for two, `ax5` for five of the same name."""
    counts = Counter(names)
    return "+".join(f"{name}x{count}" if count > 1 and repeats else name for name, count in counts.items())


# --- the user's own ---


def base_from_callable(
    function: Callable, split: Split, run_name: str, config: RunConfig, computing: ComputeSettings
) -> BaseClassifier:
    """A user's module or callable; `config` holds dataset, arch, noise_sd and what else identifies it.

    Raises UserError if it does not keep the contract (spacte.certify.contract).
    """
    if computing.precision == "int8":
        raise UserError(
            "--precision int8 quantises the networks that are known here: a classifier of your own quantises "
            "itself, as codes/examples/int8.py does, and runs in fp32"
        )
    batch_size = computing.batch_size(split)
    classifier = ForeignClassifier(function, computing.device, computing.precision, batch_size, computing.compiled)
    images, _ = split.evenly_spaced(SPOT_CHECK_IMAGES)
    logits = check_contract(classifier, with_fixed_noise(images, config.noise_sd), split.spec.num_classes)
    parameters = parameters_sha256(function)  # after the first images: lazy modules have theirs only now
    if parameters is None:
        warnings.warn(
            "no parameters are seen in the classifier: whether a resumed run has the same ones, its answers tell alone",
            stacklevel=2,
        )
    _warn_of_other_arithmetic(computing)
    config = replace(config, num_heads=(len(logits),), parameters_sha256=parameters, answers=answers(logits))
    return BaseClassifier(classifier, run_name, config, [None])


def _warn_of_other_arithmetic(computing: ComputeSettings) -> None:
    """Warn where the user's code, which has run by now, has changed torch's settings that the precision stands for."""
    now = arithmetic()
    before = dict.fromkeys(now, "none") | computing.arithmetic
    changed = [f"{name} {now[name]}, not {before[name]}" for name in now if now[name] != before[name]]
    if changed and is_main_process():
        warnings.warn(
            f"the classifier sets torch's arithmetic ({'; '.join(changed)}): the log's JSON says so under arithmetic, "
            f"beside its precision {computing.precision}",
            stacklevel=2,
        )
