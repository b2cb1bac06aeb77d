"""The layer between the noise and the network, and which one a network was trained with where its file does not say."""

import torch
from torch import Tensor, nn

from spacte.data.spec import DataSpec
from spacte.model.heads import MultiHeadResNet
from spacte.utils import UserError

NORMALISATIONS = ("mean_std", "centre", "none")
_FAR = 0.15  # nats: networks of a few epochs on digits and CIFAR-10 lie within 0.08 after their own layer
_TIMES_NEARER = 4
_FEWEST_BATCHES = 44  # of training: 0.9^44 = 1 % of bn1's statistics would still be those that it began with


class Normalize(nn.Module):
    """(images - mean) / std per channel: [N, C, H, W] -> [N, C, H, W].

    It is the first layer of the classifier, after the noise, so that sigma and every radius are in units of the
    image's own [0, 1]. Its constants are not in the state dict (the keys stay the paper's).
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return (images - self.mean) / self.std


class UnknownNormalisation(nn.Module):
    """In place of a normalisation that has not been named yet."""

    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError."""
        raise UserError(f"the checkpoint does not say its normalisation: give one of {', '.join(NORMALISATIONS)}")


def normalisation(kind: str, spec: DataSpec) -> Normalize:
    """The layer by name, with the data set's constants: mean_std (x - mean) / std, centre x - mean, none x."""
    zeros, ones = (0.0,) * len(spec.mean), (1.0,) * len(spec.mean)
    constants = {"mean_std": (spec.mean, spec.std), "centre": (spec.mean, ones), "none": (zeros, ones)}
    return Normalize(*constants[kind])


def distances(network: MultiHeadResNet, spec: DataSpec, images: Tensor) -> dict[str, float]:
    """How far bn1's running statistics lie from those of conv1's output, for each normalisation before it, in nats.

    The mean over channels of the Kullback-Leibler divergence of two normals: of the channel's mean and variance over
    the noised `images` [N, C, H, W], from bn1's. BatchNorm's epsilon is part of both variances, so that dead channels
    lie at 0.
    """
    bn1, found = network.bn1, {}
    for kind in NORMALISATIONS:
        layer = normalisation(kind, spec)
        with torch.no_grad():
            outputs = [network.conv1(layer(part)) for part in images.split(32)]  # [32, C', H', W']
            means = [torch.stack([part.mean((0, 2, 3)), part.square().mean((0, 2, 3))]) * len(part) for part in outputs]
            mean, square = torch.stack(means).double().sum(0) / len(images)
        variance, expected = square - mean**2 + bn1.eps, bn1.running_var.double() + bn1.eps
        shift = (mean - bn1.running_mean.double()) ** 2 / expected
        found[kind] = float((variance / expected + shift - 1 - (variance / expected).log()).mean() / 2)
    return found


def recognise_normalisation(network: MultiHeadResNet, spec: DataSpec, images: Tensor) -> tuple[str, str]:
    """The normalisation that the network was trained with, and a line that says how clearly the data tell.

    `images` [N, C, H, W] are noised as in training. Raises UserError with both figures where two candidates are about
    as near as each other or none is near (an untrained network, the noise of another training).
    """
    batches = int(network.bn1.num_batches_tracked)  # 0 where the file does not say
    fresh = bool((network.bn1.running_mean == 0).all() and (network.bn1.running_var == 1).all())
    ways_out = f"give --normalize {', '.join(NORMALISATIONS[:-1])} or {NORMALISATIONS[-1]}"
    if fresh or 0 < batches < _FEWEST_BATCHES:
        raise UserError(f"--normalize auto cannot tell: bn1 has seen only {batches} batches of training; {ways_out}")
    found = distances(network, spec, images)
    first, second, third = sorted(found, key=found.get)
    figures = f"bn1's statistics lie {found[first]:.2g} nats from those after {first}, {found[second]:.2g} after "
    figures += f"{second}, {found[third]:.2g} after {third}"
    if found[first] > _FAR or found[second] < _TIMES_NEARER * found[first]:
        raise UserError(f"--normalize auto cannot tell: {figures} (is --noise_sd the one of training?); {ways_out}")
    return first, f"--normalize auto takes {first}: {figures}"
