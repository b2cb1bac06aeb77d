"""What certify, predict and attack evaluate: the frozen classifier of some checkpoints on its test images.

checkpoints -> classifier -> frozen -> Smooth -> votes
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from spacte.certify.settings import ClassifierSettings
from spacte.data.sources import open_split
from spacte.data.splits import Split
from spacte.device import arithmetic, select_device, select_precision
from spacte.distributed import main_process_first
from spacte.logs.votes import VoteCounts
from spacte.model.checkpoint import Loaded, load_classifier
from spacte.model.ensemble import NetworkEnsemble
from spacte.model.frozen import freeze
from spacte.smooth.core_mhead import Draws, Sample, Smooth
from spacte.smooth.noise import GaussianNoise, GridNoise
from spacte.utils import UserError, deciding_versions, derived_seed, package_versions, run_tail, sha256, source_state


@dataclass(frozen=True)
class Evaluation:
    """A smoothed classifier on its device, a split, mostly the test one, and what a log must say of both (`config`)."""

    smooth: Smooth
    split: Split
    device: torch.device
    batch_size: int
    run: str
    config: dict
    training: list[dict | None]  # the settings that each checkpoint was trained with

    @classmethod
    def load(cls, settings: ClassifierSettings, draws: int, split: Split | None = None) -> "Evaluation":
        """Load what the settings name; `draws` is how many noisy copies of an image a claim rests on.

        A `split` that is given is evaluated in place of the test split, and must be of the classifier's images. Raises
        UserError where a setting, file or folder is wrong, or the checkpoints do not belong together.
        """
        device = select_device(settings.device, settings.compile)
        precision = select_precision(settings.precision, device)
        known = (settings.arch, settings.dataset, settings.num_heads, settings.noise_sd)
        networks = [load_classifier(Path(path), *known) for path in settings.model_path]
        joint, spec = _joint_settings(networks), networks[0].spec
        if split is None:
            where = (joint["dataset"], settings.data_dir)
            split = main_process_first(lambda: open_split(*where, False, device, spec=spec))
        elif (split.spec.shape, split.spec.class_names) != (spec.shape, spec.class_names):
            raise UserError(f"checkpoint '{settings.model_path[0]}' was trained on images of other sizes or classes")
        heads = sum(joint["num_heads"])
        if settings.head is not None and settings.head >= heads:
            raise UserError(f"--head {settings.head}: the classifier's heads are 0..{heads - 1}")

        sigma = joint["noise_sd"]
        noise = GridNoise(sigma, spec.levels) if settings.exact_noise else GaussianNoise(sigma)
        frozen = [
            freeze(network.classifier, device, precision, settings.batch_size, settings.compile) for network in networks
        ]
        smooth = Smooth(frozen[0] if len(frozen) == 1 else NetworkEnsemble(frozen), spec.num_classes, sigma, noise)
        defences = [network.defence for network in networks if network.defence]
        config = {
            **joint,
            "defence": _joint_name(defences, repeats=False) or None,
            "checkpoint_sha256": [sha256(Path(path)) for path in settings.model_path],
            "data_sha256": split.fingerprint(),
            **{name: getattr(settings, name) for name in ("head", "seed", "compile", "exact_noise")},
            "precision": precision,
            "noise_slack": noise.slack(split[0][0].numel(), draws),
            "arithmetic": arithmetic(),
            "versions": deciding_versions(package_versions()),
        }
        run = _joint_name([network.run for network in networks])
        run += "" if settings.head is None else f"-head-{settings.head}"
        training = [network.training for network in networks]
        return cls(smooth, split, device, settings.batch_size, run, config, training)

    def folder(self, logs_dir: str, kind: str) -> Path:
        """<logs_dir>/<dataset>/<arch>/noise-<sd>/<kind>."""
        return Path(logs_dir) / run_tail(self.config["dataset"], self.config["arch"], self.smooth.sigma) / kind

    def generator(self, purpose: str, idx: int) -> torch.Generator:
        """The generator of image idx's noise: a function of (purpose, seed, idx) alone."""
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
        """What a run's JSON records beside its configuration: what may change when it goes on."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "command": sys.argv,
            "flags": {name: value for one in settings for name, value in dataclasses.asdict(one).items()},
            "device": device,
            "images": len(self.split),
            **source_state(),
            "packages": package_versions(),
            "training": self.training,
        }


def _joint_settings(networks: list[Loaded]) -> dict:
    """The settings of one checkpoint or of several that belong together; architectures and heads may differ."""
    first = networks[0]
    for name in ("dataset", "noise_sd"):
        values = {network.settings[name] for network in networks}
        if len(values) > 1:
            raise UserError(f"the checkpoints' {name} differ: {', '.join(sorted(map(str, values)))}")
    for network in networks:
        if (network.spec.shape, network.spec.class_names) != (first.spec.shape, first.spec.class_names):
            raise UserError("the checkpoints were trained on different images or classes")
    if first.settings["noise_sd"] is None:
        raise UserError("the checkpoint does not say its noise_sd: give --noise_sd")
    return {
        "dataset": first.settings["dataset"],
        "arch": _joint_name([network.settings["arch"] for network in networks], repeats=False),
        "num_heads": [network.settings["num_heads"] for network in networks],
        "noise_sd": first.settings["noise_sd"],
    }


def _joint_name(names: list[str], repeats: bool = True) -> str:
    """`a` for one, `a+b` for two, `ax5` for five of the same name."""
    counts = Counter(names)
    return "+".join(f"{name}x{count}" if count > 1 and repeats else name for name, count in counts.items())
