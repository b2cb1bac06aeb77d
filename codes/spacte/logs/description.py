"""What is known of a log's classifier: from the configuration beside the log, or else from its path."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spacte.data.spec import DATASETS, SPECS
from spacte.logs.certified import known_radii
from spacte.logs.certlog import Radii, beginning
from spacte.logs.config import DESCRIBES, RunConfig, RunRecord
from spacte.logs.runfiles import RunFiles
from spacte.logs.voting import Heads
from spacte.names import as_recorded_today
from spacte.utils import UserError

T = TypeVar("T")
NORMS = ("l2", "linf", "l1")
# the fields of a description that say which one it is
DESCRIPTION = ("defence", "dataset", "arch", "heads", "sigma", "certificate", "norm")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a log's classifier; a field of which nothing is known is None. `training` are the settings that
    each of its checkpoints was trained with, as far as the JSON beside the log tells. `dimension` is the number of an
    image's values over all channels, and `norm` is the norm in which radii are given.
    """

    defence: str | None
    dataset: str | None
    arch: str | None
    heads: Heads | None
    sigma: float | None
    config: RunConfig | None
    training: tuple[dict[str, Any], ...] = ()
    dimension: int | None = None
    norm: str = "l2"

    @property
    def facts(self) -> dict[str, Any]:
        """DESCRIPTION's fields by name, the heads as text."""
        return {name: getattr(self, name) for name in DESCRIPTION} | {"heads": self.heads and str(self.heads)}

    @property
    def certificate(self) -> str | None:
        """How votes became certificates: "cohen" or "all-votes", and "top 3" where they are not of one class."""
        if self.config is None:
            return None
        top_k = self.config.top_k
        return self.config.certificate + ("" if top_k is None else f" top {top_k}")

    @property
    def stopping(self) -> str | None:
        """The rule by which a sequential run ended draws, as text."""
        return str(self.config.sequential) if self.config and self.config.sequential else None

    @property
    def per_l2(self) -> float:
        """The radius in `norm` that an L2 certificate of radius 1 implies. UserError if the dimension d is needed and
        not known.

        The L2 ball of radius r contains the L1 ball of radius r and the Linf ball of radius r / sqrt(d), and no larger
        ones: a step along an axis has the same length in L1 and L2, and a step along a diagonal is sqrt(d) times as
        long in L2 as in Linf.
        """
        if self.norm != "linf":
            return 1.0
        if self.dimension is None:
            raise UserError("--norm linf needs the images' size, which neither configuration nor data set tell")
        return self.dimension**-0.5

    def knows_radii_exactly(self, radii: Radii) -> np.ndarray:
        """At which radii [R], in its norm, certified accuracy is known exactly, not only to within a tolerance."""
        sequential = self.config.sequential if self.config else None
        return self.knows_radii(radii) & (sequential is None or sequential.tolerance is None)

    def knows_radii(self, radii: Radii) -> np.ndarray:
        """At which radii [R], in its norm, certified accuracy is known: see spacte.logs.certified.known_radii."""
        return known_radii(self.config, np.asarray(radii, dtype=float) / self.per_l2)

    @property
    def trained(self) -> float | None:
        """The sigma of the noise that the classifier was trained with; None where it is not known, or not one."""
        known = {one.get("noise_sd") for one in self.training} or {None}
        return known.pop() if len(known) == 1 else None


_ARCH = r"(?:.*[-_])?(?:R|resnet|ResNet-?)(\d+)"  # R110, CIFAR10-R110; resnet110, cifar_resnet110 of other projects
_SIGMA = r"(?:noise|sigma)[-_](\d+(?:\.\d+)?)(?:_\d+)?"  # noise-0.50; sigma_0.5; noise_0.50_7483 with a seed
_DATASETS = {"fmnist": "FashionMNIST", "fashion_mnist": "FashionMNIST"} | {name.lower(): name for name in DATASETS}


def description(path: Path) -> Description:
    """What is known of a log's classifier."""
    heads, dataset = _part(path, r"h-(\d+)-.*", int), _dataset(path)
    from_path = Description(
        defence=_part(path, r"\d([A-Z]\w+)", str),
        dataset=dataset,
        arch=_part(path, _ARCH, lambda depth: f"R{depth}"),
        heads=None if heads is None else Heads((heads,)),
        sigma=_part(path, _SIGMA, float),
        config=None,
        dimension=_dimension(None, dataset),
    )
    noted = _noted(RunFiles(path))
    if noted is None:
        return from_path
    config, training = noted.config, noted.about.get("training")
    settings = training if isinstance(training, list) else []
    return Description(
        defence=printable(config.defence or "") or (None if _is_of_others(config) else from_path.defence),
        dataset=printable(config.dataset),
        arch=printable(config.arch),
        heads=config.heads,
        sigma=config.noise_sd,
        config=config,
        training=tuple(as_recorded_today(one) for one in settings if isinstance(one, dict)),
        dimension=_dimension(noted.about.get("image_shape"), config.dataset),
    )


def _is_of_others(config: RunConfig) -> bool:
    """Whether the classifier was not trained here: it has no defence, whichever folder its log lies in."""
    return config.classifier is not None or config.normalize is not None


def _dimension(noted: object, dataset: str | None) -> int | None:
    """How many values an image has, by its shape as it is noted, or else by its data set; None: not known."""
    if isinstance(noted, list) and noted and all(type(size) is int and size > 0 for size in noted):
        return math.prod(noted)
    return math.prod(SPECS[dataset].shape) if dataset in SPECS else None


def _noted(files: RunFiles) -> RunRecord | None:
    """What the JSON beside a log holds; None, with a warning where one is there, if it does not describe a run."""
    if not files.json.exists():
        return None
    try:
        noted = files.read_json()
        wrong = noted.config.lacks(DESCRIBES)
        reason = f": {', '.join(wrong)} missing or wrong" if wrong else ""
    except UserError:
        noted, reason = None, ""
    if noted is None or reason:
        warnings.warn(f"'{files.json}' is not a configuration of ours{reason}; ignored", stacklevel=2)
        return None
    return noted


def _part(path: Path, pattern: str, kind: Callable[[str], T]) -> T | None:
    """What the pattern's group finds in the innermost part of the path that is like it."""
    for part in reversed(parts_of(path)):
        match = re.fullmatch(pattern, part)
        if match:
            return kind(match[1])
    return None


def parts_of(path: Path) -> tuple[str, ...]:
    """The path's folders and its name without .log or the like; a name like sigma_0.25 has no ending to lose."""
    name = re.sub(r"\.(log|tsv|csv|txt)$", "", path.name)
    return tuple(map(printable, (*path.absolute().parts[1:-1], name)))


def _dataset(path: Path) -> str | None:
    """The data set whose name is a part of the path, or a part of a part between hyphens (CIFAR10-R110)."""
    for part in reversed(parts_of(path)[:-1]):
        for word in part.lower().split("-"):
            if word in _DATASETS:
                return _DATASETS[word]
    return None


def printable(text: str | Path) -> str:
    r"""The text with what cannot be shown (line ends, control characters, bytes of a file's name that are no UTF-8) as
    an escape, \n or \udcff say.
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(text))


def is_seed(part: str) -> bool:
    """Whether a folder's name is that of a seed: seed-666, seed_1, seed1."""
    return re.fullmatch(r"seed[-_]?\d+", part) is not None


def is_fact(part: str) -> bool:
    """Whether a folder's name says a sigma, an architecture or a data set."""
    return re.fullmatch(f"{_ARCH}|{_SIGMA}", part) is not None or part.lower() in _DATASETS


_OTHER_KINDS = {"attack": "an attack log", "predict": "a prediction log"}


def check_certification_log(path: Path) -> None:
    """UserError if a log is another kind's."""
    kind = kind_of(path)
    if kind != "certify":
        raise UserError(f"'{path}' is {_OTHER_KINDS[kind]}: give a certification log")


def columns_of(log: Path) -> tuple[set[str], bool]:
    """The columns that a file's first line names, and whether there is a second line."""
    encoding, header = beginning(log)
    with open(log, encoding=encoding, errors="replace") as file:
        file.readline(1000)
        return set(re.split(r"[\s,]+", header[:1000])), bool(file.readline(1000))


def kind_of(log: Path) -> str:
    """What the configuration beside a log says it is, or else its columns: "certify", "attack" or "predict".

    A file that is none of them is "certify": its reader says what is wrong with it.
    """
    try:
        config = RunFiles(log).read_json().config
        if "kind" not in config.lacking and config.kind in ("certify", *_OTHER_KINDS):
            return config.kind
    except UserError:
        pass  # not a configuration of ours: the columns tell
    try:
        columns, _ = columns_of(log)
    except OSError:  # its reader says why
        return "certify"
    if "attack_radius" in columns:
        return "attack"
    return "predict" if {"idx", "predict", "correct"} <= columns and "radius" not in columns else "certify"
