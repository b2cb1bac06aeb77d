"""Classifiers: a normalisation layer and a multi-head network, built by name."""

import re

from spacte.data.spec import DataSpec, data_spec
from spacte.model.cifar_resnet_mhead import CifarResNetMultiHead
from spacte.model.classifier import Classifier
from spacte.model.heads import MultiHeadNetwork
from spacte.model.imgnet_resnet_mhead import STAGES, ImageNetResNetMultiHead
from spacte.model.lenet_mhead import LeNetMultiHead
from spacte.model.normalisation import normalisation
from spacte.utils import UserError

ARCHITECTURES = ("R8", "R14", "R20", "R32", "R44", "R56", "R110", *STAGES, "LeNet")
MOST_HEADS = 1000
LEGAL_ARCHITECTURES = f"{', '.join(ARCHITECTURES)}, any R<6n+2>"


def build_network(arch: str, num_heads: int, num_classes: int, in_channels: int) -> MultiHeadNetwork:
    """A freshly initialised network without the normalisation layer: [N, C, H, W] -> logits [L, N, K].

    Raises UserError for an unknown `arch` and where heads are not 1 to MOST_HEADS.
    """
    if not 1 <= num_heads <= MOST_HEADS:
        raise UserError(f"num_heads is {num_heads}: it must be from 1 to {MOST_HEADS}")
    if arch in STAGES:
        return ImageNetResNetMultiHead(arch, num_heads, num_classes, in_channels)
    if arch == "LeNet":
        return LeNetMultiHead(num_heads, num_classes, in_channels)
    depth = re.fullmatch(r"(?:R|cifar_resnet)(\d{1,4})", arch)
    if depth and arch == small_resnet_name(int(depth[1])):
        return CifarResNetMultiHead(int(depth[1]), num_heads, num_classes, in_channels)
    raise UserError(f"unknown architecture '{arch}': choose from {LEGAL_ARCHITECTURES}")


def small_resnet_name(depth: int) -> str | None:
    """The name of the ResNet of 6n + 2 layers for small images: R20, say; None for another depth.

    Those of 50 and 152 layers, whose names ImageNet's have, are cifar_resnet50 and cifar_resnet152.
    """
    if depth < 8 or depth % 6 != 2:
        return None
    return f"cifar_resnet{depth}" if f"R{depth}" in STAGES else f"R{depth}"


def canonical_arch(arch: str) -> str:
    """The name of an architecture here, where it is a published one's (resnet50, cifar_resnet110, lenet)."""
    named = re.fullmatch(r"(?:(cifar|cifar10|cifar100|imagenet32|svhn)_)?resnet(\d{1,4})", arch)
    if arch == "lenet":
        return "LeNet"
    if not named:
        return arch
    large = f"R{named[2]}"
    return large if large in STAGES and not named[1] else small_resnet_name(int(named[2])) or arch


def build_classifier(arch: str, dataset: str | DataSpec, num_heads: int) -> Classifier:
    """A freshly initialised `Sequential(normalise, network)`: images [N, C, H, W] in [0, 1] -> logits [L, N, K].

    `dataset` is a data set's name, or its DataSpec where the name does not tell the images' shape (ImageFolder).
    Raises UserError for unknown names and for images of a size that the network cannot take.
    """
    spec = dataset if isinstance(dataset, DataSpec) else data_spec(dataset)
    channels, height, width = spec.shape
    network = build_network(arch, num_heads, spec.num_classes, channels)
    least, most = network.min_size, network.max_size
    if min(height, width) < least or (most and max(height, width) > most):
        raise UserError(
            f"{arch} needs images of {'' if most else 'at least '}{least}x{least} pixels, "
            f"those of {spec.name} are {height}x{width}"
        )
    return Classifier(normalisation("mean_std", spec), network)
