"""Checkpoints: ours, which hold a whole run, the authors', which hold a state dict, and the field's published ones."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from spacte.data.spec import DataSpec, data_spec
from spacte.model import build_classifier
from spacte.model.normalisation import NORMALISATIONS, UnknownNormalisation, normalisation
from spacte.model.published import LEGAL, NAMES, recognised
from spacte.utils import UserError, replace_file


@dataclass(frozen=True)
class Loaded:
    """A classifier from a checkpoint, the data set it was made for, and what the checkpoint says of its training.

    `settings` holds arch, dataset, num_heads and noise_sd as the checkpoint or else the caller gave them (None where
    neither did), `run` and `defence` the names of the run and of its base defence, and `training` its flags and the
    hashes of what it took something from.
    `normalize` names the layer before the network: None where neither the file (`published`) nor the caller does; the
    classifier then runs only after `normalised_by`.
    """

    path: Path

    classifier: nn.Sequential
    spec: DataSpec
    settings: dict
    run: str
    defence: str | None
    training: dict | None
    normalize: str | None = "mean_std"
    published: bool = False

    def normalised_by(self, kind: str) -> "Loaded":
        """The same with the layer `kind` before the network."""
        classifier = nn.Sequential(normalisation(kind, self.spec), self.classifier[1]).eval()
        return replace(self, classifier=classifier, normalize=kind)


def save(path: Path, contents: dict) -> None:
    """Write a checkpoint so that `path` never holds half of one; its DataSpec under "data" becomes a dict.

    Equal contents make equal files: no name of a temporary file gets into them.
    """
    contents = {**contents, "data": asdict(contents["data"])}

    def write(temporary: Path) -> None:
        """Into an open file, whose name torch does not know."""
        with open(temporary, "wb") as file:
            torch.save(contents, file)

    replace_file(path, write)


def read(path: Path) -> dict:
    """The contents of a checkpoint on the CPU, with its DataSpec rebuilt; never runs code from the file.

    Raises UserError where the file is missing, truncated or holds no state dict.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint '{path}'")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage happens to trigger
        raise UserError(
            f"'{path}' is not a readable checkpoint (truncated or foreign): {_first_line(error)}"
        ) from error
    if isinstance(contents, dict) and contents and all(isinstance(value, torch.Tensor) for value in contents.values()):
        contents = {"state_dict": contents}
    if isinstance(contents, dict) and isinstance(contents.get("net"), dict):  # MACER's
        contents["state_dict"] = contents.pop("net")
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise UserError(f"'{path}' is a foreign file: a checkpoint holds a 'state_dict'")
    if isinstance(contents.get("data"), dict):
        try:
            contents["data"] = DataSpec(**contents["data"])
            channels, height, width = contents["data"].shape
            whole = all(type(size) is int for size in (channels, height, width, contents["data"].num_classes))
        except (TypeError, ValueError):
            whole = False
        if not whole:
            raise UserError(f"'{path}' is a foreign file: its 'data' does not describe a data set")
    if not isinstance(contents.setdefault("args", {}), dict):
        raise UserError(f"'{path}' is a foreign file: its 'args' are not the settings of a run")
    return contents


def load_classifier(
    path: Path,
    arch: str | None = None,
    dataset: str | None = None,
    num_heads: int | None = None,
    noise_sd: float | None = None,
    normalize: str = "auto",
) -> Loaded:
    """The classifier of a checkpoint, on the CPU; what the checkpoint knows need not be given.

    A checkpoint of the authors' code, `module.` in its keys or not, knows only its heads: give the rest. A published
    one of the field (spacte.model.published) becomes a network of one head; it knows its architecture, not its
    normalisation, which `normalize` names (mean_std, centre, none) or, with "auto", leaves to the data.
    Raises UserError where the file cannot be read, an argument contradicts the checkpoint (both values are named), or
    the weights do not fit the architecture or are not finite.
    """
    contents = read(path)
    state_dict = {re.sub(r"(^|\.)module\.", r"\1", key): value for key, value in contents["state_dict"].items()}
    known = {name: contents["args"].get(name) for name in ("arch", "dataset", "num_heads", "noise_sd")}
    heads_in_file = {key.split(".")[2] for key in state_dict if key.startswith("1.heads.")}
    published = None if heads_in_file else recognised(state_dict)
    if published:
        (known["arch"], state_dict), known["num_heads"] = published, 1
    elif not heads_in_file:
        named = f", arch '{contents['arch']}'," if isinstance(contents.get("arch"), str) else ""
        raise UserError(f"'{path}'{named} is not a network that is known here; there are {LEGAL}")
    known["num_heads"] = known["num_heads"] or len(heads_in_file)
    _check_normalize(path, normalize, published is not None)
    given = {"arch": NAMES.get(arch, arch), "dataset": dataset, "num_heads": num_heads, "noise_sd": noise_sd}
    for name, value in given.items():
        if value is not None and known[name] is not None and value != known[name]:
            raise UserError(f"--{name} {value} contradicts checkpoint '{path}', which has {name} {known[name]}")
    settings = {name: value if known[name] is None else known[name] for name, value in given.items()}
    missing = [name for name in ("arch", "dataset", "num_heads") if settings[name] is None]
    if missing:
        raise UserError(f"checkpoint '{path}' does not say its {missing[0]}: give --{missing[0]}")

    if published and settings["dataset"] == "ImageFolder":
        raise UserError(
            f"'{path}' does not say its mean and deviation: build it in a function, --classifier FILE.py:..."
        )
    spec = contents.get("data") or data_spec(settings["dataset"])
    classifier = build_classifier(settings["arch"], spec, settings["num_heads"])
    _fill(classifier, state_dict, path, f"{settings['arch']} with {settings['num_heads']} heads on {spec.name}")
    run = contents.get("run") or Path(path).resolve().parent.name
    training = contents["args"] | ({"inputs": contents["inputs"]} if "inputs" in contents else {})
    loaded = Loaded(Path(path), classifier.eval(), spec, settings, run, contents.get("defence"), training or None)
    if not published:
        return loaded
    if normalize == "auto":
        unknown = nn.Sequential(UnknownNormalisation(), classifier[1])
        return replace(loaded, classifier=unknown, normalize=None, published=True)
    return replace(loaded.normalised_by(normalize), published=True)


def _check_normalize(path: Path, normalize: str, published: bool) -> None:
    if normalize not in ("auto", *NORMALISATIONS):
        raise UserError(f"unknown normalisation '{normalize}': choose from auto, {', '.join(NORMALISATIONS)}")
    if not published and normalize not in ("auto", "mean_std"):
        raise UserError(f"--normalize {normalize} contradicts checkpoint '{path}', which was trained with mean_std")


def _fill(classifier: nn.Module, state_dict: dict, path: Path, wanted: str) -> None:
    expected = classifier.state_dict()
    for key in [*expected, *state_dict]:
        if key not in state_dict or key not in expected:
            where = "lacks" if key not in state_dict else "has a foreign"
            raise UserError(f"checkpoint '{path}' does not fit {wanted}: it {where} '{key}'")
        here, there = tuple(expected[key].shape), tuple(state_dict[key].shape)
        if here != there:
            raise UserError(
                f"checkpoint '{path}' does not fit {wanted}: '{key}' is {there} there and {here} here "
                "(wrong classes, channels or widths)"
            )
        if not torch.isfinite(state_dict[key]).all():
            raise UserError(f"checkpoint '{path}' holds values that are not finite in '{key}'")
    classifier.load_state_dict(state_dict)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
