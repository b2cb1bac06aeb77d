"""The field's published checkpoints: which of our networks one holds, and its weights under our names."""

import re

from torch import Tensor
from torchvision.models.resnet import Bottleneck

from spacte.model.cifar_resnet_mhead import DEPTHS
from spacte.model.imgnet_resnet_mhead import STAGES

NAMES = {  # what the field calls them
    "cifar_resnet20": "R20",
    "cifar_resnet110": "R110",
    "cifar100_resnet110": "R110",
    "imagenet32_resnet110": "R110",
    "resnet18": "R18",
    "resnet34": "R34",
    "resnet50": "R50",
    "resnet101": "R101",
    "resnet152": "R152",
}
LEGAL = (
    "multi-head networks of this project or of the SPACTE authors, and the field's ResNets with conv1, bn1, layer1 to "
    f"layer3 or layer4, and fc ({', '.join(DEPTHS)}; {', '.join(STAGES)}); any other: --classifier FILE.py:function"
)


def recognised(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """The architecture and the weights as a network of one head names them; None where it is none of the field's.

    The last stage and fc become head 0. `state_dict` has no `module.` in its keys; `1.`, which stands for the layer
    after the normalisation, may be there (the family of Cohen et al., ICML 2019) or not (MACER, torchvision). Files of
    before torch 0.4 lack BatchNorm's num_batches_tracked, which no logit depends on.
    """
    weights = {key.removeprefix("1."): value for key, value in state_dict.items()}
    if not {"conv1.weight", "bn1.running_mean", "fc.weight"} <= weights.keys():
        return None
    blocks = [len(_block_numbers(weights, stage)) for stage in range(1, 5)]
    arch = _architecture(tuple(blocks[: 4 if blocks[3] else 3]), any(".conv3." in key for key in weights))
    if arch is None:
        return None
    last = f"layer{4 if blocks[3] else 3}."
    renamed = {}
    for key, value in weights.items():
        key = re.sub(f"^{re.escape(last)}", "heads.0.0.", re.sub(r"^fc\.", "heads.0.1.", key))
        renamed[f"1.{key}"] = value
        if key.endswith("running_var"):
            counter = f"1.{key.removesuffix('running_var')}num_batches_tracked"
            renamed.setdefault(counter, value.new_zeros((), dtype=int))
    return arch, renamed


def _block_numbers(weights: dict[str, Tensor], stage: int) -> set[str]:
    return {key.split(".")[1] for key in weights if key.startswith(f"layer{stage}.")}


def _architecture(blocks: tuple[int, ...], bottleneck: bool) -> str | None:
    """The name of the network with so many blocks in its stages."""
    if len(blocks) == 3:
        depth = f"R{6 * blocks[0] + 2}"
        return depth if len(set(blocks)) == 1 and depth in DEPTHS and not bottleneck else None
    for arch, (block, there) in STAGES.items():
        if there == blocks and (block is Bottleneck) == bottleneck:
            return arch
    return None
