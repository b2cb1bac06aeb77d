"""What certify, predict and attack work on: the frozen classifier of some checkpoints and its test images.

checkpoints -> classifier -> frozen -> Smooth
"""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spacte import cli
from spacte.checkpoint import Loaded, load_classifier
from spacte.core_mhead import Asks, Drawing, Smooth
from spacte.counts import Votes, voter_of
from spacte.data import DATASETS, open_split
from spacte.device import arithmetic, select_device
from spacte.inference import freeze
from spacte.model import ARCHITECTURES
from spacte.noise import GaussianNoise, GridNoise
from spacte.processes import main_process_first
from spacte.splits import Split
from spacte.utils import UserError, derived_seed, package_versions, run_tail, sha256, source_sha256


def add_flags(parser: cli.Parser) -> None:
    """The flags that say which classifier, which images, and how they are computed with."""
    add = parser.add_argument
    add("--model_path", required=True, nargs="+", help="checkpoint; of several, the logits are summed (an ensemble)")
    known = "as in the checkpoint; one of the authors' does not say"
    add("--arch", help=f"one of {', '.join(ARCHITECTURES)} ({known})")
    add("--dataset", help=f"one of {', '.join(DATASETS)} ({known})")
    add("--num_heads", type=cli.positive_int, help="L (as in the checkpoint)")
    add("--noise_sd", type=cli.positive_float, help=f"sigma, in units of [0, 1] ({known})")
    add("--head", type=cli.non_negative_int, help="this head alone votes, from 0 (the sum of all)")
    add("--data_dir", default="./data", help="where the data set's files are, or are downloaded to")
    add("--skip", type=cli.positive_int, default=1, help="every skip-th image: 0, skip, 2 skip, ...")
    add("--max", type=cli.positive_int, help="only images whose idx is below this")
    add("--batch_size", type=cli.positive_int, default=1000, help="noisy images a forward pass")
    add("--seed", type=cli.seed, default=0, help="image idx's generator is seeded by (seed, idx) alone")
    add("--exact_noise", action="store_true", help="noise on the data's grid: sound in floating point, slower")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network's arithmetic")
    add("--compile", action="store_true", help="through torch.compile: a minute at the start, then faster")
    add("--logs_dir", default="./logs", help="logs: <logs_dir>/<dataset>/<arch>/noise-<sd>/")


@dataclass(frozen=True)
class Subject:
    """A smoothed classifier on its device, the test split, and what a log must say of both."""

    smooth: Smooth
    split: Split
    device: torch.device
    run: str
    config: dict
    training: list[dict | None]  # the flags that each checkpoint was trained with

    @property
    def sigma(self) -> float:
        """The noise's standard deviation, in units of [0, 1]."""
        return self.config["noise_sd"]

    @property
    def voter(self) -> int:
        """The row of the vote counts that the log is about."""
        return voter_of(self.config)

    def folder(self, logs_dir: str, kind: str) -> Path:
        """<logs_dir>/<dataset>/<arch>/noise-<sd>/<kind>."""
        return Path(logs_dir) / run_tail(self.config["dataset"], self.config["arch"], self.sigma) / kind

    def generator(self, purpose: str, idx: int) -> torch.Generator:
        """The generator of image idx's noise: a function of (purpose, seed, idx) alone."""
        return torch.Generator(self.device).manual_seed(derived_seed(purpose, self.config["seed"], idx))

    def count(
        self, purpose: str, indices: Iterable[int], asks: Callable[[int], Asks], batch_size: int
    ) -> Iterator[Votes]:
        """Votes of the images, in about their order.

        `asks(label)` asks for an image's copies (see Drawing) and returns its selection and estimation votes.
        """

        def drawing(idx: int) -> Drawing:
            image, label = self.split[idx]
            return Drawing(image, self.generator(purpose, idx), asks(label), key=(idx, label))

        for done in self.smooth.count_together(map(drawing, indices), batch_size):
            yield Votes(*done.key, done.seconds, *done.result)

    def about(self, args: Namespace) -> dict:
        """What a run's JSON records beside its configuration: what may change when it goes on."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "command": sys.argv,
            "flags": vars(args),
            "device": device,
            "images": len(self.split),
            "source_sha256": source_sha256(),
            "training": self.training,
        }


def prepare(args: Namespace, draws: int) -> Subject:
    """Load what the flags of `add_flags` name; `draws` is how many noisy copies of an image a claim rests on.

    Raises UserError where a flag, file or folder is wrong, or the checkpoints do not belong together.
    """
    device = select_device(args.device, args.compile)
    networks = [
        load_classifier(Path(path), args.arch, args.dataset, args.num_heads, args.noise_sd) for path in args.model_path
    ]
    settings, spec = _joint_settings(networks), networks[0].spec
    split = main_process_first(lambda: open_split(settings["dataset"], args.data_dir, False, device, spec=spec))
    heads = sum(network.settings["num_heads"] for network in networks)
    if args.head is not None and args.head >= heads:
        raise UserError(f"--head {args.head}: the classifier's heads are 0..{heads - 1}")

    sigma, pixels = settings["noise_sd"], split[0][0].numel()
    noise = GridNoise(sigma, spec.levels) if args.exact_noise else GaussianNoise(sigma)
    classifiers = [
        freeze(network.classifier, device, args.precision, args.batch_size, args.compile) for network in networks
    ]
    smooth = Smooth(classifiers[0] if len(classifiers) == 1 else Ensemble(classifiers), spec.num_classes, sigma, noise)
    config = {
        **settings,
        "defence": _joint_name([network.defence for network in networks if network.defence], repeats=False) or None,
        "checkpoint_sha256": [sha256(Path(path)) for path in args.model_path],
        "data_sha256": split.fingerprint(),
        **{name: getattr(args, name) for name in ("head", "skip", "seed", "precision", "compile", "exact_noise")},
        "noise_slack": noise.slack(pixels, draws),
        "arithmetic": arithmetic(),
        "versions": package_versions(),
    }
    head = "" if args.head is None else f"-head-{args.head}"
    run = _joint_name([network.run for network in networks]) + head
    return Subject(smooth, split, device, run, config, [network.training for network in networks])


class Ensemble(nn.Module):
    """All heads of several networks, side by side: images [N, C, H, W] -> logits [L1 + L2 + ..., N, K].

    Their sum is the networks' summed logits: the DNN ensemble of Horvath et al. (ICLR 2022).
    """

    def __init__(self, networks: list[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head of every network."""
        return torch.cat([network(images) for network in self.networks])


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
