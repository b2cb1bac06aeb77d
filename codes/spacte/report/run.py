"""A certification log as a run, and what is known of its classifier: from its configuration or its path."""

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from spacte.data.spec import DATASETS
from spacte.logs.runfiles import RunFiles
from spacte.utils import UserError, as_recorded_today

# the fields of a run that say which one it is
DESCRIPTION = ("defence", "dataset", "arch", "heads", "sigma", "certificate")


@dataclass(frozen=True)
class Run:
    """A certification log and what its configuration or else its path says of the classifier (None: neither does).

    `name` is the training run's, `training` what each of the classifier's checkpoints was trained with, as far as the
    configuration tells, `place` its folders where the rest does not tell two runs apart, and `method` those by which
    logs differ that nothing else is known of.
    """

    name: str
    path: Path
    log: pd.DataFrame
    defence: str | None
    dataset: str | None
    arch: str | None
    heads: str | None
    sigma: float | None
    config: dict | None
    training: tuple[dict, ...] = ()
    place: str = ""
    method: str = ""

    @property
    def described(self) -> tuple:
        """Its name and what is known of the classifier: equal for the seeds of one experiment."""
        return (self.name, *(getattr(self, name) for name in DESCRIPTION))

    @property
    def certificate(self) -> str | None:
        """How votes became certificates: "cohen" or "all-votes"."""
        return None if self.config is None else self.config["certificate"]

    @property
    def trained(self) -> float | None:
        """The sigma of the noise that the classifier was trained with; None where it is not known, or not one."""
        known = {one.get("noise_sd") for one in self.training} or {None}
        return known.pop() if len(known) == 1 else None

    @property
    def variant(self) -> tuple[str, ...]:
        """What a checkpoint's training did otherwise than the paper: "no teaching", "no cosine", "5 teachers", ..."""
        words = []
        for one in self.training:
            words.append({"none": "no teaching", "self": "paced by self"}.get(one.get("paced_by")))
            words.append(f"pace share {one['pace_share']}" if one.get("pace_share") is not None else None)
            words.append(f"{len(one['teachers'])} teachers" if one.get("teachers") else None)
            flags = ("whole_gradient", "frozen_trunk", "no_cosine")
            words += [name.replace("_", " ") for name in flags if one.get(name)]
            sigma = one.get("noise_sd")
            words.append(f"trained at sigma {sigma:g}" if _is_number(sigma) and sigma != self.sigma else None)
        return tuple(dict.fromkeys(filter(None, words)))

    @property
    def title(self) -> str:
        """The name, and the place where it takes that to tell two runs apart."""
        return f"{self.name} ({self.place})" if self.place else self.name


_ARCH = r"(?:.*[-_])?(?:R|resnet|ResNet-?)(\d+)"  # R110, CIFAR10-R110; resnet110, cifar_resnet110 of other projects
_SIGMA = r"(?:noise|sigma)[-_](\d+(?:\.\d+)?)(?:_\d+)?"  # noise-0.50; sigma_0.5; noise_0.50_7483 with a seed
_NICKNAMES = {"fmnist": "FashionMNIST", "fashion_mnist": "FashionMNIST"}  # of data sets


def description(path: Path) -> dict:
    """What is known of a log's classifier, by the names of Run's fields, and its configuration."""
    from_path = {
        "defence": _part(path, r"\d([A-Z]\w+)", str),
        "dataset": _known(path, DATASETS),
        "arch": _part(path, _ARCH, lambda depth: f"R{depth}"),
        "heads": _part(path, r"h-(\d+)-.*", str),
        "sigma": _part(path, _SIGMA, float),
    }
    noted = _noted(RunFiles(path))
    if noted is None:
        return from_path | {"config": None}
    config, training = noted["config"], noted["about"].get("training")
    return {
        "defence": printable(config.get("defence") or "") or from_path["defence"],
        "dataset": printable(config["dataset"]),
        "arch": printable(config["arch"]),
        "heads": heads_of(config),
        "sigma": config["noise_sd"],
        "config": {"certificate": "cohen"} | config,  # older runs do not name it
        "training": tuple(as_recorded_today(one) for one in training if isinstance(one, dict))
        if isinstance(training, list)
        else (),
    }


def heads_of(config: dict) -> str:
    """Who votes: 5, 5+1 (of two networks), head 2 of 5, 5 by consensus of 2."""
    heads = "+".join(map(str, config["num_heads"]))
    if config["head"] is not None:
        return f"head {config['head']} of {heads}"
    return f"{heads} by consensus of {config['consensus']}" if config.get("consensus") else heads


def _noted(files: RunFiles) -> dict | None:
    """The configuration beside a log and what is noted about the run: {"config", "about"}.

    None, with a warning where a JSON is there, if it does not describe a run.
    """
    if not files.json.exists():
        return None
    noted = None
    try:
        noted = files.read_json()
        wrong = wrong_fields({"defence": None, **noted["config"]}, _LEGAL)
        reason = f": {', '.join(wrong)} missing or wrong" if wrong else ""
    except (UserError, TypeError):
        wrong, reason = True, ""
    if wrong:
        warnings.warn(f"'{files.json}' is not a configuration of ours{reason}; ignored", stacklevel=2)
    return None if wrong else noted


def wrong_fields(config: dict, legal: dict[str, Callable]) -> list[str]:
    """The fields that a configuration lacks or whose values are not legal."""
    return [name for name, accept in legal.items() if name not in config or not accept(config[name])]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


_LEGAL = {  # what must be in a configuration for it to say which classifier was certified
    "dataset": lambda value: isinstance(value, str),
    "arch": lambda value: isinstance(value, str),
    "num_heads": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "noise_sd": lambda value: _is_number(value) and value > 0,
    "head": lambda value: value is None or _is_number(value),
    "defence": lambda value: value is None or isinstance(value, str),
}
MAKES_CERTIFICATES = {  # and what else must be there to make certificates from votes
    "alpha": lambda value: _is_number(value) and 0 < value < 1,
    "noise_slack": lambda value: value == 0 or (_is_number(value) and 0 < value < 1),
    "sequential": lambda value: value is None or isinstance(value, dict),
    "skip_wrong": lambda value: isinstance(value, bool),
}


def _part(path: Path, pattern: str, kind: Callable):
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


def differing_parts(paths: list[Path]) -> list[str]:
    """What tells each path from the others: its parts after the folders that all share, without those alike in all."""
    parts = [parts_of(path) for path in paths]
    folders = zip(*(part[:-1] for part in parts), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda found: len(set(found)) == 1, folders))
    parts = [part[shared:][::-1] for part in parts]  # innermost first: the paths may differ in depth
    places = [place for place, found in enumerate(itertools.zip_longest(*parts)) if len(set(found)) > 1]
    return ["/".join(part[place] for place in reversed(places) if place < len(part)) for part in parts]


def _known(path: Path, names) -> str | None:
    """The one of the names that is a part of the path, or a part of a part between hyphens (CIFAR10-R110)."""
    known = _NICKNAMES | {name.lower(): name for name in names}
    for part in reversed(parts_of(path)[:-1]):
        for word in part.lower().split("-"):
            if word in known:
                return known[word]
    return None


def method_parts(place: str) -> str:
    """Of folders a/b/c those that say neither sigma, architecture, data set nor seed: what may be a method's name."""
    known = {*_NICKNAMES, *(name.lower() for name in DATASETS)}
    said = re.compile(rf"{_ARCH}|{_SIGMA}|seed[-_]?\d+")
    return "/".join(part for part in place.split("/") if not said.fullmatch(part) and part.lower() not in known)


def printable(text: str | Path) -> str:
    r"""The text with what UTF-8 cannot hold (bytes of a file's name that are none) as an escape, \udcff say."""
    return str(text).encode("utf-8", errors="backslashreplace").decode("utf-8")
