"""What a training run computes (Recipe) and where it does so (Place), and the flags that say both."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from spacte import cli
from spacte.data.spec import DATASETS
from spacte.model import LEGAL_ARCHITECTURES
from spacte.names import run_tail, unused_settings
from spacte.precision import PRECISIONS
from spacte.train.teaching import PACED_BY
from spacte.utils import UserError


@dataclass(frozen=True)
class Recipe:
    """What a run computes, whatever its base defence; a resumed run must agree with it.

    The flags of `add_recipe_flags` say what each field is.
    """

    inputs: ClassVar = ("teachers", "frozen_trunk")  # what names checkpoints that the training takes something from

    dataset: str = "CIFAR10"
    arch: str = "R110"
    num_heads: int = 5
    noise_sd: float = 0.25
    num_noise_vec: int = 2
    lbdlast: float = 1.2
    eps: float = 0.8
    paced_by: str = "neighbour"
    pace_share: float | None = None
    whole_gradient: bool = False
    teachers: tuple[str, ...] = ()
    frozen_trunk: str | None = None
    no_cosine: bool = False
    train_images: int | None = None
    epochs: int = 150
    batch_size: int = 256
    lr_init: float = 0.1
    lr_step_size: int = 50
    gamma: float = 0.1
    wd: float = 1e-4
    seed: int = 666
    precision: str = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        """UserError if a setting has nothing to act on."""
        object.__setattr__(self, "teachers", tuple(self.teachers))
        heads = self.num_heads
        if self.pace_share is not None and not self.paced:
            whose = "no head is paced" if self.paced_by == "none" else "one head has no neighbour"
            raise UserError(f"--pace_share {self.pace_share}: {whose}, give --paced_by self")
        if self.pace_share is not None and self.epochs == 1:
            raise UserError(f"--pace_share {self.pace_share}: lambda is measured from the second epoch on")
        if self.whole_gradient and heads == 1:
            raise UserError("--whole_gradient: one head has its whole gradient")
        if self.whole_gradient and abs(self.eps - (1 - 1 / heads)) > 0.005:
            raise UserError(
                f"--whole_gradient undoes a mean over {heads} heads that all weigh 1/{heads}: give --eps "
                f"{1 - 1 / heads:.3g}"
            )
        if self.teachers and heads not in (1, len(self.teachers)):
            raise UserError(
                f"--teachers names {len(self.teachers)} checkpoints for {heads} heads: give one for each head, or any "
                "number with --num_heads 1"
            )

    @property
    def paced(self) -> bool:
        """Whether a lambda weights samples: always where heads pace themselves, by the neighbour where there is one."""
        return self.paced_by == "self" or (self.paced_by == "neighbour" and self.num_heads > 1)

    @property
    def tail(self) -> Path:
        """The part that all of a run's folders share: <dataset>/<arch>/noise-<sd>."""
        return run_tail(self.dataset, self.arch, self.noise_sd)

    @property
    def name(self) -> str:
        """The authors' name of a run of this recipe, h-5-eps-0.8-m-2-lbdlast-1.2; h-1-m-2 where the rest is unused."""
        if self.num_heads > 1:
            return self.older_name
        lbdlast = "" if "lbdlast" in unused_settings(vars(self)) else f"-lbdlast-{self.lbdlast}"
        return f"h-1-m-{self.num_noise_vec}{lbdlast}"

    @property
    def older_name(self) -> str:
        """What older versions called it: what is unused stood in the name, too."""
        return f"h-{self.num_heads}-eps-{self.eps}-m-{self.num_noise_vec}-lbdlast-{self.lbdlast}"

    @property
    def variant(self) -> str:
        """What the run's name ends in where the recipe is not the paper's."""
        parts = {"neighbour": [], "self": ["paced-by-self"], "none": ["no-teaching"]}[self.paced_by]
        parts += [] if self.pace_share is None else [f"pace-share-{self.pace_share}"]
        parts += ["whole-gradient"] * self.whole_gradient
        parts += [f"teachers-{len(self.teachers)}"] if self.teachers else []
        parts += [] if self.frozen_trunk is None else ["frozen-trunk"]
        parts += ["no-cosine"] * self.no_cosine
        parts += [] if self.train_images is None else [f"images-{self.train_images}"]
        return "".join(f"-{part}" for part in parts)


@dataclass(frozen=True)
class Place:
    """Where and how a run runs; a resumed run may change all of it (--precision auto depends on the device)."""

    data_dir: str = "./data"
    save_dir: str = "./save"
    logs_dir: str = "./logs"
    runs_dir: str = "./runs"
    save_freq: int = 10
    test_freq: int = 1
    device: str = "auto"
    workers: int | None = None  # None: `available_workers`
    no_cuda_graph: bool = False
    resume: bool = False


_MOST_WORKERS = 16  # at 3 ms a file of ImageNet's size they read about 5,000 a second


def available_workers() -> int:
    """How many processes should read files for this one: its cores, shared with torchrun's others on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _MOST_WORKERS))


def add_recipe_flags(parser: cli.Parser) -> None:
    """The flags of a Recipe."""
    recipe = parser.add_argument_group("what is trained")
    add = recipe.add_argument
    add("--dataset", help=f"one of {', '.join(DATASETS)}")
    add("--arch", help=f"one of {LEGAL_ARCHITECTURES}")
    add("--num_heads", type=cli.positive_int, help="L, the number of heads; 1 is the base defence alone")
    add("--noise_sd", type=cli.image_norm, help="sigma, in units of [0, 1]")
    add("--num_noise_vec", type=cli.positive_int, help="m, noise vectors per image; a batch makes m steps (MACER: one)")
    add("--lbdlast", type=cli.pace, help="lambda, the pace of teaching, in the last epoch")
    add("--eps", type=cli.probability, help="the best head weighs 1 - eps, the others share eps; 1 - 1/L: all alike")
    paced = "whose loss weights what a head learns: its neighbour's (circular teaching), its own, none (weights are 1)"
    either = recipe.add_mutually_exclusive_group().add_argument
    either("--paced_by", choices=PACED_BY, help=paced)
    without = "--paced_by none: the heads do not teach each other"
    either(
        "--no_teaching", action="store_const", const="none", dest="paced_by", default=argparse.SUPPRESS, help=without
    )
    share = "lambda per class: a quantile of the class's losses, from 1 down to Q in the last epoch; replaces --lbdlast"
    add("--pace_share", type=cli.share, metavar="Q", help=share)
    whole = "multiply the gradients of the heads' own parameters by L: undoes the mean over L heads (--eps 1 - 1/L)"
    add("--whole_gradient", action="store_true", help=whole)
    taught = "also distil these networks: one for each head or, with one head, the mean of their predictions"
    add("--teachers", nargs="+", metavar="CHECKPOINT", help=taught)
    trunk = "heads alone are trained, on the trunk of this network"
    add("--frozen_trunk", metavar="CHECKPOINT", help=trunk)
    add("--no_cosine", action="store_true", help="without the cosine constraint between the heads")
    add("--train_images", type=cli.positive_int, help="train on the first images of each class, this many in all")
    add("--epochs", type=cli.positive_int, help="passes over the training images")
    add("--batch_size", type=cli.positive_int, help="images per batch, over all processes")
    add("--lr_init", type=cli.positive_float, help="first learning rate")
    add("--lr_step_size", type=cli.positive_int, help="epochs between drops of the learning rate")
    add("--gamma", type=cli.positive_float, help="factor of such a drop")
    add("--wd", type=cli.non_negative_float, help="weight decay")
    add("--seed", type=cli.seed, help="random seed of the weights, the order and the noise")
    add("--precision", choices=PRECISIONS, help="auto: tf32 on CUDA (convolutions only), else fp32")
    add("--compile", action="store_true", help="through torch.compile: faster on a GPU, no faster on the CPUs we tried")
    parser.set_defaults(**cli.defaults_of(Recipe) | {"precision": "auto"})


def add_place_flags(parser: cli.Parser) -> None:
    """The flags of a Place."""
    add = parser.add_argument_group("where and how it runs").add_argument
    add("--data_dir", help="where the data set's files are, or are downloaded to")
    add("--save_dir", help="checkpoints: <save_dir>/<dataset>/<arch>/noise-<sd>/<run>/epochN.pth")
    add("--logs_dir", help="text logs")
    add("--runs_dir", help="TensorBoard files")
    add("--save_freq", type=cli.positive_int, help="epochs between checkpoints")
    add("--test_freq", type=cli.positive_int, help="epochs between evaluations on noisy test images")
    add("--device", help="auto, cpu, cuda or cuda:<index>")
    files = f"that read ImageNet's files, and draw their crops (one for each core, {_MOST_WORKERS} at most)"
    add("--workers", type=cli.non_negative_int, help=f"processes {files}")
    graph = "launch a step's kernels one by one on a GPU; else a step is one CUDA graph, with the same values"
    add("--no_cuda_graph", action="store_true", help=graph)
    add("--resume", action="store_true", help="resume after the newest whole checkpoint of this run, if there is one")
    parser.set_defaults(**cli.defaults_of(Place))
