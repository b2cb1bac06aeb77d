"""What certify, predict and attack evaluate: the classifier of some checkpoints, or the user's own, on test images.

checkpoints -> classifier -> frozen -> Smooth -> votes
FILE.py:function -> classifier -> checked -> Smooth -> votes
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import binom

from spacte.certify.base import (
    BaseClassifier,
    Computing,
    chosen,
    enough_images,
    joint_settings,
    noised,
    of_callable,
    of_checkpoints,
)
from spacte.certify.settings import ClassifierSettings
from spacte.data.sources import open_split
from spacte.data.spec import DATASETS, DataSpec
from spacte.data.splits import Split
from spacte.device import arithmetic, select_device, select_precision
from spacte.distributed import broadcast_object, main_process_first
from spacte.logs.runfiles import RunFiles
from spacte.logs.votes import VoteCounts
from spacte.model import foreign
from spacte.model.checkpoint import load_classifier
from spacte.model.pass_size import fastest_pass, fix_passes, pass_size
from spacte.smooth.draws import Draws
from spacte.smooth.noise import GaussianNoise, GridNoise
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import Sample
from spacte.smooth.voters import AllHeads
from spacte.utils import UserError, deciding_versions, derived_seed, package_versions, run_tail, sha256, source_state

_UNLIKELY = 0.01


@dataclass(frozen=True)
class Evaluation:
    """A smoothed classifier on its device, a split, mostly the test one, and what a log must say of both (`config`)."""

    smooth: Smooth
    split: Split
    device: torch.device
    batch_size: int
    images_per_pass: int | None  # None: as the run was begun, see fix_passes
    run_name: str
    config: dict
    training: list[dict | None]  # the settings that each checkpoint was trained with

    @classmethod
    def load(cls, settings: ClassifierSettings, draws: int, split: Split | None = None) -> "Evaluation":
        """Load what the settings name; `draws` is how many noisy copies of an image a claim rests on.

        A `split` that is given is evaluated in place of the test split, and must be of the classifier's images. Raises
        UserError where a setting, file or folder is wrong, the checkpoints do not belong together, or the user's own
        classifier does not keep the contract.
        """
        computing = computing_of(settings)
        if settings.classifier is not None:
            return cls.of(*_from_function(settings, computing), settings, computing, draws)
        if settings.classifier_args:
            raise UserError("--classifier_args are a function's: they need --classifier FILE.py:function")
        known = (settings.arch, settings.dataset, settings.num_heads, settings.noise_sd, settings.normalize)
        measured = None
        if split is None and settings.dataset == "ImageFolder":  # a published checkpoint does not know its images
            measured = _test_split("ImageFolder", settings, computing, None)
        measured_spec = None if measured is None else measured.spec
        networks = [load_classifier(Path(path), *known, measured_spec) for path in settings.model_path]
        joint, spec = joint_settings(networks), networks[0].spec
        if measured is not None and spec is measured_spec:
            split = measured
        elif split is None:
            split = _test_split(joint["dataset"], settings, computing, spec)
        elif (split.spec.shape, split.spec.class_names) != (spec.shape, spec.class_names):
            raise UserError(f"checkpoint '{settings.model_path[0]}' was trained on images of other sizes or classes")
        return cls.of(of_checkpoints(networks, split, computing), split, settings, computing, draws)

    @classmethod
    def of(
        cls, base: BaseClassifier, split: Split, settings: ClassifierSettings, computing: Computing, draws: int
    ) -> "Evaluation":
        """The smoothed classifier over `base`. Raises UserError where the settings ask for heads that are not there."""
        heads = sum(base.config["num_heads"])
        if settings.head is not None and settings.head >= heads:
            raise UserError(f"--head {settings.head}: the classifier's heads are 0..{heads - 1}")
        if settings.consensus is not None:
            _check_consensus(settings, getattr(base.network, "members", heads))
        sigma = base.config["noise_sd"]
        noise = GridNoise(sigma, split.spec.levels) if settings.exact_noise else GaussianNoise(sigma)
        config = {
            **base.config,
            "data_sha256": split.fingerprint(),
            **{name: getattr(settings, name) for name in ("head", "seed", "compile", "exact_noise")},
            "precision": computing.precision,
            "noise_slack": noise.slack(split[0][0].numel(), draws),
            "arithmetic": arithmetic(),
            "versions": deciding_versions(package_versions()),
        }
        run = base.run_name + ("" if settings.head is None else f"-head-{settings.head}")
        if settings.consensus is not None:
            config["consensus"] = settings.consensus
            run += f"-consensus-{settings.consensus}"
        smooth = Smooth(base.network, split.spec.num_classes, sigma, noise, settings.consensus)
        passes = settings.images_per_pass
        batch_size = computing.batch_size(split)
        return cls(smooth, split, computing.device, batch_size, passes, run, config, base.training)

    def fix_passes(self, files: RunFiles, overwrite: bool) -> None:
        """Let passes on the CPU be as large as requested, or as the run's JSON or its other shards' say; else measure.

        So the counts of a run, whose last digit they may decide, are the same in all its parts, except that shards
        which begin in the same moment may measure differently. Every process must ask.
        """
        network = self.smooth.base_classifier

        def decided() -> int | None:
            """The main process decides for all."""
            if self.images_per_pass is not None:
                return self.images_per_pass
            earlier = files.noted(overwrite)
            if earlier is not None and earlier.get("device") == "cpu":
                return earlier.get("images_per_pass")
            return fastest_pass(network, self.split[0][0])

        fix_passes(network, broadcast_object(decided))

    @torch.inference_mode()
    def warn_at_chance(self) -> None:
        """Warn where the base classifier is right on no more noised images, from the whole split, than by guessing.

        Guessing always names the commonest class; the share that is right must lie above that by more than chance does
        in one of 100 cases. Nothing is said where so few images could not show it.
        """
        images, labels = chosen(self.split, enough_images(self.split))
        images = noised(images, self.smooth.sigma).to(self.device)
        named = AllHeads(self.smooth.base_classifier, self.smooth.num_classes)(images)[-1].cpu()
        count, right = len(labels), int((named == labels).sum())
        chance = max(1 / self.smooth.num_classes, float(labels.bincount().max()) / count)
        if chance**count < _UNLIKELY and binom.sf(right - 1, count, chance) >= _UNLIKELY:
            warnings.warn(
                f"the classifier is right on {right} of {count} noised images, as guessing would be: is it trained for "
                "this noise, and are the classes in the order of the labels?",
                stacklevel=2,
            )

    def folder(self, logs_dir: str, kind: str) -> Path:
        """<logs_dir>/<dataset>/<arch>/noise-<sd>/<kind>."""
        return Path(logs_dir) / run_tail(self.config["dataset"], self.config["arch"], self.smooth.sigma) / kind

    def generator(self, purpose: str, idx: int) -> torch.Generator:
        """The generator of image idx's noise: a function of (purpose, seed, idx) alone. What it draws on CUDA also
        depends on the card's number of multiprocessors.
        """
        # of the image's own, so that skips, shards and batches, which change the order of images, change no draw
        return torch.Generator(self.device).manual_seed(derived_seed(purpose, self.config["seed"], idx))

    def sample(self, purpose: str, indices: Iterable[int], draws_of: Callable[[int], Draws]) -> Iterator[VoteCounts]:
        """The votes of the images, in about their order; `draws_of(label)` says what is drawn for an image."""
        labels = {}

        def samples() -> Iterator[Sample]:
            """Each image's sample when it is its turn, so that few are in memory."""
            for idx in indices:
                image, labels[idx] = self.split[idx]
                yield Sample(image, self.generator(purpose, idx), draws_of(labels[idx]), idx)

        for done in self.smooth.sample(samples(), self.batch_size):
            yield VoteCounts(done.idx, labels.pop(done.idx), done.seconds, done.selection, done.estimation)

    def about(self, *settings) -> dict:
        """What a run's JSON records beside its configuration: what may change when it resumes.

        Of these a log depends on the device: only the same model of card draws the same noise as a GPU did.
        """
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "command": sys.argv,
            "flags": {name: value for one in settings for name, value in dataclasses.asdict(one).items()},
            "device": device,
            "batch_size": self.batch_size,
            "images_per_pass": pass_size(self.smooth.base_classifier, self.split[0][0]),
            "images": len(self.split),
            **source_state(),
            "packages": package_versions(),
            "training": self.training,
        }


def _check_consensus(settings: ClassifierSettings, members: int) -> None:
    if settings.head is not None:
        raise UserError("--head and --consensus: a head votes alone or not; relog.py --head makes its log")
    if members < 3:
        raise UserError(f"--consensus needs at least 3 heads, or networks of an ensemble: here is {members}")
    if not 2 <= settings.consensus < members:
        raise UserError(f"--consensus {settings.consensus}: it must lie in 2..{members - 1}, of {members} that vote")


def computing_of(settings: ClassifierSettings) -> Computing:
    """The device and the arithmetic that the settings name. Raises UserError for what is not there."""
    device = select_device(settings.device, settings.compile)
    precision = select_precision(settings.precision, device)
    return Computing(device, precision, settings.batch_size, settings.compile, arithmetic())


def _test_split(dataset: str, settings: ClassifierSettings, computing: Computing, spec: DataSpec | None) -> Split:
    return main_process_first(lambda: open_split(dataset, settings.data_dir, False, computing.device, spec=spec))


def _from_function(settings: ClassifierSettings, computing: Computing) -> tuple[BaseClassifier, Split]:
    """What --classifier names, and the test images."""
    for name, legal in (("dataset", f"one of {', '.join(DATASETS)}"), ("noise_sd", "sigma, in units of [0, 1]")):
        if getattr(settings, name) is None:
            raise UserError(f"--classifier does not say its {name}: give --{name}, {legal}")
    for name, default in (("arch", None), ("num_heads", None), ("normalize", "auto")):
        if getattr(settings, name) != default:
            raise UserError(f"--{name} is about a checkpoint's network: a --classifier is what its function returns")
    arguments = foreign.parsed_arguments(settings.classifier_args)
    path, name = foreign.parts(settings.classifier)
    function = foreign.build(settings.classifier, arguments)
    config = {
        "dataset": settings.dataset,
        "arch": foreign.printable_name(path.stem),
        "classifier": f"{path.name}:{name}",
        "classifier_args": arguments,
        "classifier_sha256": sha256(path),
    }
    split = _test_split(settings.dataset, settings, computing, None)
    run = foreign.run_name(name, arguments)
    return of_callable(function, split, settings.noise_sd, run, config, computing), split
