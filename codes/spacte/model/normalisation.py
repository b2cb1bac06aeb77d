"""The layer between the noise and the network: its names, its constants, and those of published networks."""

import math

import torch
from torch import Tensor, nn

from spacte.data.spec import DataSpec
from spacte.utils import UserError

NORMALISATIONS = ("mean_std", "centre", "none")
LEGAL_NORMALISATIONS = f"{', '.join(NORMALISATIONS)} or constants m,m,m/s,s,s"
_FIELD = (  # constants of networks that people publish, whatever the data set
    ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # CIFAR-10's, with the deviations that most code copies
    ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),  # CIFAR-10's, with its true deviations
    ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),  # CIFAR-100's
    ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # CIFAR-100's in CAT-RS and ACR-weakness
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
)
_SAME = 0.005  # of a deviation: constants that are nearer to each other make the same network, but for a vote in 1,000

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # of each channel, mean and deviation


class Normalize(nn.Module):
    """(images - mean) / std per channel: [N, C, H, W] -> [N, C, H, W].

    It is the first layer of the classifier, after the noise, so that sigma and every radius are in units of the
    image's own [0, 1]. Its constants are not in the state dict (the keys stay the paper's).
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return (images - self.mean) / self.std


class UnknownNormalisation(nn.Module):
    """In place of a normalisation that has not been named yet."""

    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError."""
        raise UserError(f"the checkpoint does not say its normalisation: give {LEGAL_NORMALISATIONS}")


def normalisation(name: str, spec: DataSpec) -> Normalize:
    """The layer by name: mean_std is (x - mean) / std and centre is x - mean, with the data set's constants; none is x.
    Or the name holds constants, m,m,m/s,s,s. Raises UserError otherwise.
    """
    return Normalize(*constants(name, spec))


def constants(name: str, spec: DataSpec) -> Constants:
    """The constants of a normalisation's name, for the channels of the data set. UserError as of `parse_constants`."""
    channels = spec.shape[0]
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    named = {"mean_std": (spec.mean, spec.std), "centre": (spec.mean, ones), "none": (zeros, ones)}
    if name in named:
        return named[name]
    mean, std = parse_constants(name)
    if len(mean) not in (1, channels):
        raise UserError(f"--normalize {name}: {spec.name} has {channels} channels, there are constants for {len(mean)}")
    return mean * (channels // len(mean)), std * (channels // len(std))


def parse_constants(text: str) -> Constants:
    """The constants that a text m,m,m/s,s,s holds, one for each channel or one for all.

    Raises UserError if it is not of that form; its message lists the names of normalisations, too.
    """
    means, slash, deviations = text.partition("/")
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in (means, deviations))
    except ValueError:
        mean = std = ()
    if not slash or not mean or len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise UserError(f"unknown normalisation '{text}': choose from auto, {LEGAL_NORMALISATIONS} (s > 0)")
    return mean, std


def name_of(values: Constants, spec: DataSpec) -> str:
    """The name of a normalisation with these constants, the only one it has in a log."""
    for name in NORMALISATIONS:
        if constants(name, spec) == values:
            return name
    return "/".join(",".join(map(_digits, part)) for part in values)


def _digits(value: float) -> str:
    """A number's shortest decimals that are exactly it."""
    short = f"{value:g}"  # 1 in place of 1.0
    return short if float(short) == value else repr(value)


def known(spec: DataSpec) -> dict[str, Constants]:
    """The normalisations by name that networks for such images are trained with, the likeliest first.

    Not by an ImageFolder's own mean and deviation, which are here those of the test images.
    """
    channels = spec.shape[0]
    halves = ((0.5,) * channels, (0.5,) * channels)
    named = [constants(name, spec) for name in NORMALISATIONS if name == "none" or spec.name != "ImageFolder"]
    candidates = [*named, halves, *(_FIELD if channels == 3 else ())]
    return {name_of(values, spec): values for values in candidates}


def are_the_same(one: Constants, other: Constants) -> bool:
    """Whether two normalisations differ by so little that data do not tell them apart."""
    pairs = zip(one[0] + one[1], other[0] + other[1], one[1] * 2, strict=True)
    return all(abs(a - b) <= _SAME * deviation for a, b, deviation in pairs)
