"""Calibration of int8: the scales of a network's activations, measured on noised training images.

network, its BatchNorm folded, and images -> the same network, which measures while it quantises -> scales
"""

import copy
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spacte.model.heads import MultiHeadNetwork
from spacte.model.int8 import quantise

SCALE_IMAGES = 500  # of training, on which scales are measured
_AT_ONCE = 64  # images at a time; the first ones say how biases are shifted: 30 images were as good as 500


@dataclass
class Scales:
    """What the quantisation of a network depends on besides its weights, measured on noised training images.

    `peaks` are the largest absolute activations, by the name of the convolution, block or linear layer that they go
    into; `shifts` [C] is what is added to each convolution's bias, so that quantising does not move its mean output.
    """

    noise_sd: float
    images: int
    peaks: dict[str, float] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """A hash of peaks and shifts."""
        digest = hashlib.sha256()
        for name in sorted(self.peaks):
            digest.update(f"{name} {self.peaks[name].hex()}\n".encode())
        for name in sorted(self.shifts):
            digest.update(name.encode() + self.shifts[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to_file(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return dict(vars(self))

    @classmethod
    def from_file(cls, held: Any) -> "Scales":
        """What `to_file` made. Raises ValueError if it is not that."""
        try:
            noise_sd, images = float(held["noise_sd"]), int(held["images"])
            peaks = {str(name): float(peak) for name, peak in held["peaks"].items()}
            shifts = {str(name): shift.detach().float() for name, shift in held["shifts"].items()}
        except (TypeError, LookupError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise ValueError("incomplete scales of int8") from error
        legal = all(1e-30 < peak < 1e30 for peak in (*peaks.values(), noise_sd))  # as float32 holds
        if not legal or not all(shift.dim() == 1 and shift.isfinite().all() for shift in shifts.values()):
            raise ValueError("scales of int8 that are not positive or finite")
        return cls(noise_sd, images, peaks, shifts)


@torch.no_grad()
def calibrate(network: MultiHeadNetwork, images: Tensor, noise_sd: float) -> Scales:
    """The scales of a network whose BatchNorm is folded, in float32 on the CPU, on normalised noised training images
    [N, C, H, W].

    They are the same for any number of threads: sums of integers are exact, means are taken in float64, and the
    rounding errors that remain are rounded off. A CPU that fuses multiplications with additions may still find another
    digit: the hash then differs.
    """
    images = images.to(memory_format=torch.channels_last)
    few = images[:: max(1, len(images) // _AT_ONCE)][:_AT_ONCE].contiguous(memory_format=torch.channels_last)
    means = _means(network, few)
    scales = Scales(noise_sd, len(images))
    first = quantise(copy.deepcopy(network), scales.peaks, scales.shifts, means)
    for part in (few, *images.split(_AT_ONCE)):
        first(part)  # each layer measures its input, then quantises it
    scales.shifts.clear()  # they belonged to the peaks of the first images
    quantise(copy.deepcopy(network), scales.peaks, scales.shifts, means)(few)
    return scales


def _means(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The mean output of each convolution, [C] in float64."""
    exact, sums = copy.deepcopy(network).double(), dict[str, Tensor]()

    def add(name: str, output: Tensor) -> None:
        sums[name] = sums.get(name, 0) + output.mean((2, 3)).sum(0)

    for name, module in exact.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output, name=name: add(name, output))
    for part in images.split(_AT_ONCE // 4):
        exact(part.double())
    return {name: total / len(images) for name, total in sums.items()}
