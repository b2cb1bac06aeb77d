"""A classifier from a checkpoint: ours, which holds a whole run, the authors' or another published one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spacte.data.spec import DataSpec, data_spec
from spacte.device import keep_rng_state, torch_defaults
from spacte.model import MOST_HEADS, build_classifier, canonical_arch, checkpoint_file
from spacte.model.classifier import Classifier
from spacte.model.frozen import scales_of
from spacte.model.heads import MultiHeadNetwork
from spacte.model.identity import structure_sha256
from spacte.model.imgnet_resnet_mhead import STAGES
from spacte.model.normalisation import (
    NORMALISATIONS,
    UnknownNormalisation,
    constants,
    name_of,
    normalisation,
    parse_constants,
)
from spacte.model.published import KNOWN, Weights, how_to_certify_it, identify_network, published_name
from spacte.model.scales import Scales
from spacte.names import printable_name
from spacte.provenance import SOURCE_FIELDS
from spacte.utils import UserError, listed


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier from a checkpoint, the data set it was made for, and what the checkpoint says of its training.

    `arch`, `dataset`, `num_heads` and `noise_sd` are the caller's or else the checkpoint's (`noise_sd` may be None: not
    known), `run` and `defence` the names of the run and of its base defence, and `training` its flags, the hashes of
    what it took something from (`inputs`), which flags say where it ran (`places`), and the code that ran (`source`).
    `normalize` names the layer before the network: None where neither the file (`published`) nor the caller does; the
    classifier then runs only after `normalised_by`. `scales` are those of int8, where the file holds them.
    `file_sha256` is the hash of the file that was read, `classifier_sha256` says what the classifier was then.
    """

    path: Path
    file_sha256: str
    classifier: Classifier
    classifier_sha256: str
    spec: DataSpec
    arch: str
    dataset: str
    num_heads: int
    noise_sd: float | None
    run: str
    defence: str | None
    training: dict | None
    normalize: str | None = "mean_std"
    published: bool = False
    scales: Scales | None = None

    def with_scales(self, images: Tensor, noise_sd: float | None = None) -> "LoadedClassifier":
        """The same with what int8 needs, measured on training images [N, C, H, W] in [0, 1], at training's noise or
        another. UserError if they are not that, or this CPU cannot compute int8.
        """
        noise_sd = noise_sd or self.noise_sd
        shape = tuple(self.spec.shape)
        if noise_sd is None:
            raise UserError(f"'{self.path}' does not say its noise_sd: give it to with_scales")
        if not isinstance(images, Tensor) or tuple(images.shape[1:]) != shape or not len(images):
            raise UserError(f"scales are measured on images [N, {', '.join(map(str, shape))}]")
        if not images.is_floating_point() or not 0 <= float(images.min()) <= float(images.max()) <= 1:
            raise UserError("scales are measured on images in [0, 1], floating point")
        return replace(self, scales=scales_of(self.classifier, images.float(), noise_sd))

    def check_unchanged(self) -> None:
        """UserError if the classifier is not the one that was loaded."""
        if structure_sha256(self.classifier) != self.classifier_sha256:
            raise UserError(
                f"'{self.path}': the classifier has changed since it was loaded; load it again, or certify what it is "
                "now as a module of your own, its .classifier"
            )

    def normalised_by(self, name: str) -> "LoadedClassifier":
        """The same with the normalisation `name` before the network."""
        self.check_unchanged()
        classifier, known = _normalised(self.classifier.network, name, self.spec)
        return replace(self, classifier=classifier, classifier_sha256=structure_sha256(classifier), normalize=known)


def _normalised(network: MultiHeadNetwork, name: str, spec: DataSpec) -> tuple[Classifier, str]:
    """The network behind the normalisation `name`, and what that is called."""
    with torch_defaults():
        classifier = Classifier(normalisation(name, spec), network).eval()
    return classifier, name_of(constants(name, spec), spec)


_LEGAL: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "dataset": lambda value: isinstance(value, str),
    "num_heads": lambda value: type(value) is int and 1 <= value <= MOST_HEADS,
    "noise_sd": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf,
}


def load_classifier(
    path: Path | str,
    arch: str | None = None,
    dataset: str | None = None,
    num_heads: int | None = None,
    noise_sd: float | None = None,
    normalize: str = "auto",
    spec: DataSpec | None = None,
) -> LoadedClassifier:
    """The classifier of a checkpoint, on the CPU; what the checkpoint knows need not be given.

    A checkpoint of the authors' code, `module.` in its keys or not, knows only its heads: give the rest. A published
    one (spacte.model.published) becomes a network of one head; it knows its architecture, not its normalisation, which
    `normalize` names (mean_std, centre, none, or constants m,m,m/s,s,s) or, with "auto", leaves to the data. For an
    ImageFolder, of which it knows nothing, `spec` is that of the split.
    `noise_sd` may be another than training's: the smoothed classifier is then evaluated there.
    Raises UserError if the file cannot be read, another argument contradicts the checkpoint (both values are named),
    or the weights do not fit the architecture or are not finite.
    """
    return classifier_from_contents(
        checkpoint_file.read(path), path, arch, dataset, num_heads, noise_sd, normalize, spec
    )


def classifier_from_contents(
    contents: dict, path: Path | str, arch: str | None = None, dataset: str | None = None, num_heads: int | None = None,
    noise_sd: float | None = None, normalize: str = "auto", spec: DataSpec | None = None,
) -> LoadedClassifier:  # fmt: skip
    """What `load_classifier` makes of what `read` has found in the file."""
    path, weights = Path(path), identify_network(contents["state_dict"])
    if weights is None:
        named = f", arch '{contents['arch']}'," if isinstance(contents.get("arch"), str) else ""
        raise UserError(
            f"'{path}'{named} is not a network that is known here: its keys are "
            f"{listed(contents['state_dict'], 4)}; there are {KNOWN}; {how_to_certify_it(path, contents['keys'])}"
        )
    published = weights.arch is not None
    normalize = _checked_normalize(path, normalize, published, weights.constants)
    settings = _settings(contents, weights, path, arch, dataset, num_heads, noise_sd)
    spec = _spec(contents, settings["dataset"], path, spec)
    with torch_defaults(), keep_rng_state(torch.device("cpu")):  # its first weights are drawn, and replaced
        classifier = build_classifier(settings["arch"], spec, settings["num_heads"])
    heads = f"{settings['num_heads']} head{'s' * (settings['num_heads'] > 1)}"
    wanted = f"{settings['arch']} with {heads} on {spec.name}"
    _fill(classifier, weights, path, wanted, how_to_certify_it(path, contents["keys"]))
    run, defence = (contents[name] if isinstance(contents.get(name), str) else None for name in ("run", "defence"))
    run = printable_name(run or path.resolve().parent.name)  # it names files
    training = contents["args"] | {name: contents[name] for name in ("inputs", "places") if name in contents}
    source = {name: contents[name] for name in SOURCE_FIELDS if name in contents}
    training |= {"source": source} if source else {}
    training = {} if published else training  # another code's flags say nothing here
    known: str | None = "mean_std"
    if published:
        classifier, known = _published_classifier(classifier.network, normalize, spec, path)
    return LoadedClassifier(
        path, contents["file_sha256"], classifier.eval(), structure_sha256(classifier), spec, **settings, run=run,
        defence=defence, training=training or None, normalize=known, published=published,
        scales=None if published else _scales_in(contents, path),
    )  # fmt: skip


def _settings(
    contents: dict, weights: Weights, path: Path, arch: str | None, dataset: str | None, num_heads: int | None,
    noise_sd: float | None,
) -> dict[str, Any]:  # fmt: skip
    """arch, dataset, num_heads and noise_sd as the caller gave them, or else as the file says.

    UserError if the file's are damaged, the caller's contradict them, or one but noise_sd is not known.
    """
    known = {name: contents["args"].get(name) for name in ("arch", "dataset", "num_heads", "noise_sd")}
    if weights.arch is not None:
        known = {"arch": weights.arch, "dataset": None, "num_heads": 1, "noise_sd": None}
    for name, value in known.items():
        if value is not None and not _LEGAL[name](value):
            raise UserError(f"checkpoint '{path}' is damaged: its {name} is {str(value)[:40]}")
    known["num_heads"] = known["num_heads"] or weights.heads
    for name, value in (("arch", arch), ("dataset", dataset), ("num_heads", num_heads), ("noise_sd", noise_sd)):
        if value is not None and not _LEGAL[name](value):
            raise UserError(f"{name} {str(value)[:40]}, a {type(value).__name__}: a checkpoint cannot have it")
    given = {"arch": arch and canonical_arch(arch), "dataset": dataset, "num_heads": num_heads, "noise_sd": noise_sd}
    for name, value in given.items():
        if value is not None and known[name] is not None and value != known[name] and name != "noise_sd":
            raise UserError(f"--{name} {value} contradicts checkpoint '{path}', which has {name} {known[name]}")
    settings = {name: known[name] if value is None else value for name, value in given.items()}
    missing = [name for name in ("arch", "dataset", "num_heads") if settings[name] is None]
    if missing:
        own = "; of a network that is not one of ours, certify your own function (--classifier)" * (
            missing[0] == "arch"
        )
        raise UserError(f"checkpoint '{path}' does not say its {missing[0]}: give --{missing[0]}{own}")
    return settings


def _spec(contents: dict, dataset: str, path: Path, given: DataSpec | None) -> DataSpec:
    """The data set as the file describes it, or else as its name, for an ImageFolder the caller, does."""
    spec = contents.get("data") or (given if dataset == "ImageFolder" else None) or data_spec(dataset)
    if dataset != printable_name(spec.name):  # it names folders
        raise UserError(f"checkpoint '{path}' is of data set '{dataset}', but its data are '{spec.name}'")
    return spec


def _published_classifier(
    network: MultiHeadNetwork, normalize: str, spec: DataSpec, path: Path
) -> tuple[Classifier, str | None]:
    """A published network behind the normalisation, and its name; with "auto" behind a placeholder, and None."""
    if normalize == "auto":
        return Classifier(UnknownNormalisation(), network), None
    if spec.name == "ImageFolder" and normalize in ("mean_std", "centre"):
        raise UserError(
            f"--normalize {normalize}: '{path}' does not say the mean and deviation of its training images; "
            "give them, --normalize m,m,m/s,s,s"
        )
    return _normalised(network, normalize, spec)


def _scales_in(contents: dict, path: Path) -> Scales | None:
    """The scales that release.py --int8 has written. UserError if they are damaged."""
    if "int8" not in contents:
        return None
    try:
        return Scales.from_file(contents["int8"])
    except ValueError as error:
        raise UserError(f"checkpoint '{path}' holds {error}") from error


def _checked_normalize(path: Path, normalize: str, published: bool, in_file: str | None) -> str:
    """The normalisation that is asked for, or that the file holds. UserError if they contradict each other."""
    if normalize not in ("auto", *NORMALISATIONS):
        parse_constants(normalize)
    if not published and normalize not in ("auto", "mean_std"):
        raise UserError(f"--normalize {normalize} contradicts checkpoint '{path}', which was trained with mean_std")
    if in_file is None or normalize == in_file:
        return normalize
    if normalize != "auto":
        raise UserError(f"--normalize {normalize} contradicts checkpoint '{path}', which holds {in_file}")
    return in_file


def _fill(classifier: nn.Module, weights: Weights, path: Path, wanted: str, otherwise: str) -> None:
    misfit = f"checkpoint '{path}' does not fit {wanted}"
    expected = classifier.state_dict()
    for key in [*expected, *weights.tensors]:
        if key not in weights.tensors or key not in expected:
            where = "lacks" if key not in weights.tensors else "has an unexpected"
            raise UserError(
                f"{misfit}: it {where} '{weights.names.get(key, _published_name(key, weights))}'; {otherwise}"
            )
        here, there = tuple(expected[key].shape), tuple(weights.tensors[key].shape)
        name = weights.names.get(key, key)
        if here != there:
            raise UserError(f"{misfit}: '{name}' is {there} in it, not {here} ({_why(key, here, there)}); {otherwise}")
        if not torch.isfinite(weights.tensors[key]).all():
            raise UserError(f"checkpoint '{path}' holds values that are not finite in '{name}'")
    classifier.load_state_dict(weights.tensors)


def _published_name(key: str, weights: Weights) -> str:
    """The name that a weight which the file lacks would have there."""
    if weights.arch is None:
        return key
    return published_name(key, 4 if weights.arch in STAGES else 3)


def _why(key: str, here: tuple[int, ...], there: tuple[int, ...]) -> str:
    """What another shape of a weight means."""
    if key.endswith((".1.weight", ".1.bias")) and ".heads." in key and here[1:] == there[1:]:
        return f"wrong classes: it knows {there[0]}, the data have {here[0]}; is --dataset right?"
    if key == "1.conv1.weight" and here[0] == there[0] and here[2:] == there[2:]:
        return f"wrong channels: it takes {there[1]}, the data have {here[1]}; is --dataset right?"
    kernel = len(here) == len(there) == 4 and here[2:] != there[2:]
    return f"another {'kernel' if kernel else 'width'}, so another architecture"
