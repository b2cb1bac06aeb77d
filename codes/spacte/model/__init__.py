"""Classifiers: a normalisation layer and a multi-head network, built by name."""

from torch import nn

from spacte.data.spec import DataSpec, data_spec
from spacte.model.cifar_resnet_mhead import DEPTHS, CifarResNetMultiHead
from spacte.model.heads import MultiHeadResNet
from spacte.model.imgnet_resnet_mhead import STAGES, ImageNetResNetMultiHead
from spacte.model.normalisation import normalisation
from spacte.utils import UserError

ARCHITECTURES = (*DEPTHS, *STAGES)


def build_network(arch: str, num_heads: int, num_classes: int, in_channels: int) -> MultiHeadResNet:
    """A freshly initialised network without the normalisation layer: [N, C, H, W] -> logits [L, N, K].

    Raises UserError for an unknown `arch` or fewer than one head.
    """
    if num_heads < 1:
        raise UserError(f"num_heads is {num_heads}: it must be at least 1")
    if arch in DEPTHS:
        return CifarResNetMultiHead(DEPTHS[arch], num_heads, num_classes, in_channels)
    if arch in STAGES:
        return ImageNetResNetMultiHead(arch, num_heads, num_classes, in_channels)
    raise UserError(f"unknown architecture '{arch}': choose from {', '.join(ARCHITECTURES)}")


def build_classifier(arch: str, dataset: str | DataSpec, num_heads: int) -> nn.Sequential:
    """A freshly initialised `Sequential(normalise, network)`: images [N, C, H, W] in [0, 1] -> logits [L, N, K].

    `dataset` is a data set's name, or its DataSpec where the name does not tell the images' shape (ImageFolder).
    Raises UserError for unknown names and for images that are too small for the network.
    """
    spec = dataset if isinstance(dataset, DataSpec) else data_spec(dataset)
    channels, height, width = spec.shape
    network = build_network(arch, num_heads, spec.num_classes, channels)
    if min(height, width) < network.min_size:
        raise UserError(
            f"{arch} needs images of at least {network.min_size}x{network.min_size} pixels, "
            f"those of {spec.name} are {height}x{width}"
        )
    return nn.Sequential(normalisation("mean_std", spec), network)
