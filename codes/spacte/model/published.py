"""Published checkpoints: which of our networks one holds, and its weights under our names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from spacte.model import LEGAL_ARCHITECTURES, small_resnet_name
from spacte.model.imgnet_resnet_mhead import STAGES

KNOWN = (
    "multi-head networks of this project or of the SPACTE authors, published ResNets with conv1, bn1, layer1 to "
    f"layer3 or layer4, and fc, and LeNet ({LEGAL_ARCHITECTURES})"
)
_WRAPPERS = ("module", "_orig_mod", "model", "backbone", "net", "network", "base_model", "classifier", "1")
_MEANS = ("mean", "means", "mu", "new_mean", "image_mean", "_mean")
_DEVIATIONS = ("std", "stds", "sds", "sd", "sigma", "new_std", "image_std", "_std")
CONTAINERS = ("state_dict", "net", "model", "model_state_dict", "model_state", "ema", "ema_state_dict", "model_ema")
_LENET = {"conv1": (20, None, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (None, 500)}


@dataclass(frozen=True)
class Weights:
    """A state dict: `tensors` by our names, and `names`, which gives the name in the file for each of ours.

    `arch` is None where the file is no published network's; `constants` are those of a normalisation in the file.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    arch: str | None
    heads: int
    constants: str | None


def identify_network(state_dict: dict[str, Tensor]) -> Weights | None:
    """What a state dict holds, without the names of what wraps the network; None where it is no network known here.

    Ours and the authors' keep their names. Others become networks of one head: the last stage and fc are head 0.
    `1.`, which stands for the layer after the normalisation, may be there (the family of Cohen et al., ICML 2019) or
    not (MACER, torchvision). Files of before torch 0.4 lack BatchNorm's num_batches_tracked, which no logit depends on.
    """
    names = {re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", key): key for key in state_dict}
    names.pop("n_averaged", None)  # of torch's AveragedModel
    layer = {name: key for name, key in names.items() if name.rsplit(".", 1)[-1] in (*_MEANS, *_DEVIATIONS)}
    constants = _constants({name: state_dict[key] for name, key in layer.items()})
    if constants is not None:
        names = {name: key for name, key in names.items() if name not in layer}
    names = _unwrapped(names)
    weights = {name: state_dict[key] for name, key in names.items()}
    heads = {name.split(".")[1] for name in weights if name.startswith("heads.")}
    if heads:
        arch, renamed = None, {name: name for name in weights}
    elif _is_lenet(weights):
        arch, renamed = "LeNet", {name: _lenet_name(name) for name in weights}
        weights["fc1.weight"] = weights["fc1.weight"].view(500, 50, 4, 4)
    else:
        arch, renamed = _resnet(weights)
        if arch is None:
            return None
    tensors = {f"1.{renamed[name]}": value for name, value in weights.items()}
    for key, value in list(tensors.items()) if not heads else ():
        if key.endswith("running_var"):
            batches = f"{key.removesuffix('running_var')}num_batches_tracked"
            tensors.setdefault(batches, value.new_zeros((), dtype=torch.int64))
    in_file = {f"1.{renamed[name]}": key for name, key in names.items()}
    return Weights(tensors, in_file, arch, len(heads) or 1, constants)


def _unwrapped(names: dict[str, str]) -> dict[str, str]:
    """The names without what all of them begin with, as long as that is a wrapper's."""
    while names and all("." in name for name in names):
        first = {name.split(".", 1)[0] for name in names}
        if len(first) > 1 or first.isdisjoint(_WRAPPERS):
            break
        names = {name.split(".", 1)[1]: key for name, key in names.items()}
    return names


def _constants(layer: dict[str, Tensor]) -> str | None:
    """The normalisation m,m,m/s,s,s that tensors of that name hold; None where they are not one of each."""
    sides = [
        [value for name, value in layer.items() if name.rsplit(".", 1)[-1] in side] for side in (_MEANS, _DEVIATIONS)
    ]
    if [len(side) for side in sides] != [1, 1] or any(value.numel() not in (1, 3) for (value,) in sides):
        return None
    return "/".join(",".join(f"{float(x):.6g}" for x in value.flatten()) for (value,) in sides)


def _is_lenet(weights: dict[str, Tensor]) -> bool:
    if weights.keys() != {f"{name}.{kind}" for name in _LENET for kind in ("weight", "bias")}:
        return False
    sizes = ((weights[f"{name}.weight"].shape, size) for name, size in _LENET.items())
    return all(len(a) == len(b) and all(y in (x, None) for x, y in zip(a, b, strict=True)) for a, b in sizes)


def _lenet_name(name: str) -> str:
    return name.replace("fc1.", "heads.0.0.0.").replace("fc2.", "heads.0.1.")


def _resnet(weights: dict[str, Tensor]) -> tuple[str | None, dict[str, str]]:
    """The architecture of a ResNet and our names of its weights; None where it is not one."""
    if not {"conv1.weight", "bn1.running_mean", "fc.weight"} <= weights.keys():
        return None, {}
    blocks = [len(_block_numbers(weights, stage)) for stage in range(1, 5)]
    stages = 4 if blocks[3] else 3
    arch = _architecture(tuple(blocks[:stages]), any(".conv3." in key for key in weights))
    last = f"layer{stages}."
    ours = {key: re.sub(f"^{last}", "heads.0.0.", re.sub(r"^fc\.", "heads.0.1.", key)) for key in weights}
    return arch, ours


def published_name(key: str, stages: int) -> str:
    """The published name of a weight or layer of a ResNet of one head with that many stages."""
    return key.removeprefix("1.").replace("heads.0.0.", f"layer{stages}.").replace("heads.0.1.", "fc.")


def _block_numbers(weights: Iterable[str], stage: int) -> set[str]:
    return {key.split(".")[1] for key in weights if key.startswith(f"layer{stage}.")}


def _architecture(blocks: tuple[int, ...], bottleneck: bool) -> str | None:
    """The name of the network with that many blocks in its stages."""
    if len(blocks) == 3:
        return small_resnet_name(6 * blocks[0] + 2) if len(set(blocks)) == 1 and not bottleneck else None
    for arch, (block, there) in STAGES.items():
        if there == blocks and (block is Bottleneck) == bottleneck:
            return arch
    return None


def state_dict_of(contents: Any, depth: int = 3) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """The state dict that a file's contents hold, under the names in use, and the path of keys to it.

    None where there is none.
    """
    if not isinstance(contents, dict) or not contents:
        return None
    tensors = {key: value for key, value in contents.items() if isinstance(value, Tensor)}
    if len(tensors) == len(contents) and all(isinstance(key, str) for key in tensors):
        return tensors, ()
    for name in CONTAINERS if depth else ():
        found = state_dict_of(contents.get(name), depth - 1)
        if found:
            return found[0], (name, *found[1])
    return None


def how_to_certify_it(path: Path, keys: tuple[str, ...] = ("state_dict",)) -> str:
    """How the user certifies a network that is not known here, as the end of a sentence: three lines to copy."""
    inside = "".join(f"[{key!r}]" for key in keys)
    return (
        "certify it as your own function, --classifier my.py:build, where my.py holds three lines: `import torch`, "
        "`from my_code import MyNetwork  # images in [0, 1] -> logits`, `def build(): network = MyNetwork(); "
        f"network.load_state_dict(torch.load({str(path)!r}, map_location='cpu'){inside}); return network`"
    )
