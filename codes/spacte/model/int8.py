"""Our networks in int8 on the CPU: activations of 8 bits with fixed scales, weights of 7 bits per channel, exact sums.

image -> normalised -> uint8 -> convolution [+ shortcut] and ReLU -> uint8 -> ... -> mean over pixels -> linear layer

An activation q stands for (q - zero) * step, and step is fixed beforehand, so that an image's logits do not depend on
the images that share its batch. Convolutions are oneDNN's, which sum products of integers in 32 bits and then scale,
add bias and shortcut, and round, all in one pass. CPUs without VNNI add the products of two neighbours in 16 bits: with
weights from -64 to 64 these never overflow (2 * 255 * 64 < 2^15), so every CPU has the exact sum. The linear layers,
too, multiply integers whose sums float64 holds exactly. What is left to round are products and sums of single numbers:
the order of a sum, which threads and sizes of passes decide, changes nothing.

Sources: Jacob et al. (CVPR 2018), section 2; the biases' shifts: Nagel et al. (ICCV 2019), section 4.2, on data.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from spacte.model.heads import MultiHeadResNet
from spacte.utils import UserError

SCALE_IMAGES = 500  # of training, on which scales are measured
_WEIGHT = 64  # the largest weight
_UNSIGNED, _SIGNED = 255, 127  # the largest activation: after a ReLU, or on either side of the zero
_ZERO = 128  # where activations of both signs have theirs
_FEW = 8  # every 8th image says how the biases are shifted: float64 is slow, and 30 images were as good as 500
_AT_ONCE = 50  # images of which a layer's float32 output is in memory
_LINEAR_WEIGHT, _POOLED = 2**20, 2**12  # integers of the linear layer: up to 2^20 * 2^20 * 8192 channels = 2^53


@dataclass
class Scales:
    """What the quantisation of a network depends on beside its weights, measured on noised training images.

    `peaks` are the largest absolute activations, by the name of the convolution after whose ReLU they were seen (of a
    block's last one with the shortcut added), under "input" that of the normalised image; `shifts` [C] is what is added
    to each convolution's bias, so that quantising its weights does not move its mean output.
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
        """What `to_file` made. Raises ValueError where it is not that."""
        try:
            noise_sd, images = float(held["noise_sd"]), int(held["images"])
            peaks = {str(name): float(peak) for name, peak in held["peaks"].items()}
            shifts = {str(name): shift.detach().float() for name, shift in held["shifts"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError("scales of int8 that are not whole") from error
        whole = all(math.isfinite(peak) and peak > 0 for peak in peaks.values())
        if not whole or not all(shift.dim() == 1 and shift.isfinite().all() for shift in shifts.values()):
            raise ValueError("scales of int8 that are not finite")
        return cls(noise_sd, images, peaks, shifts)


@torch.no_grad()
def measured(network: MultiHeadResNet, images: Tensor, noise_sd: float) -> Scales:
    """The scales of a network whose BatchNorm is folded, in float32 on the CPU, on normalised noised training images
    [N, C, H, W].

    They are the same for any number of threads: sums of integers are exact, means are taken in float64, and what is
    left of rounding is rounded off. A CPU that rounds a product once less may find another digit, which the hash tells.
    """
    scales = Scales(noise_sd, len(images))
    means = _means(network, images[::_FEW])
    quantised = quantise(copy.deepcopy(network), scales, means)
    quantised(images.to(memory_format=torch.channels_last))  # each layer measures its own input, and then quantises
    return scales


def _means(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The mean output of each convolution, [C] in float64."""
    exact, sums, pixels = copy.deepcopy(network).double(), dict[str, Tensor](), dict[str, int]()

    def add(name: str, output: Tensor) -> None:
        sums[name] = sums.get(name, 0) + output.sum((0, 2, 3))
        pixels[name] = pixels.get(name, 0) + output.numel() // output.shape[1]

    for name, module in exact.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output, name=name: add(name, output))
    for part in images.split(_AT_ONCE // 2):
        exact(part.double())
    return {name: total / pixels[name] for name, total in sums.items()}


def quantise(network: MultiHeadResNet, scales: Scales, means: Mapping[str, Tensor] | None = None) -> MultiHeadResNet:
    """The network, its BatchNorm folded, with its layers quantised; uint8 goes from layer to layer.

    Where gradients are enabled it runs as before, in float32. With `means` of the convolutions' outputs the `scales`
    are measured by the first images that it sees. Raises UserError where they are of another network.
    """
    walk = _Walk(scales, means)
    image = walk.activations("input", signed=True)
    last = walk.through(network, "", image, but=network.heads)
    network.conv1 = nn.Sequential(_Input(image), cast(nn.Module, network.conv1))
    for number, head in enumerate(network.heads):
        stage, linear = cast(nn.Sequential, head)
        end = walk.through(stage, f"heads.{number}.0.", last)
        cast(nn.Sequential, head)[0] = nn.Sequential(stage, _Values())
        cast(nn.Sequential, head)[1] = _Linear(cast(nn.Linear, linear), end)
    return network


def check_exact() -> None:
    """UserError where this machine's torch has no such convolutions, or they do not sum exactly."""
    convolution = nn.Conv2d(64, 16, 3, padding=1).requires_grad_(False)
    nn.init.ones_(convolution.weight)
    nn.init.zeros_(cast(Tensor, convolution.bias))
    scales = Scales(0.0, 0, {"x": 127.5, "y": 2 * 9 * 64 * 127.5})  # steps 1/2 and 9 * 64: all weights are 1
    walk = _Walk(scales, None)
    ones = torch.full((2, 64, 4, 4), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            tested = _Convolution(convolution, "y", walk.activations("x"), walk.activations("y"))
            values = tested.raw(ones)[0, 0]
    except (AttributeError, RuntimeError) as error:
        raise UserError("--precision int8 needs torch's oneDNN on an x86 CPU: choose fp32 or bf16") from error
    products = F.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding=1)[0, 0]
    if not torch.equal(values, products * 64 * 127.5):
        raise UserError("--precision int8: this CPU does not sum 8-bit products exactly: choose fp32 or bf16")


@dataclass
class _Activations:
    """How those in one place of the network are quantised; not yet known while they are measured."""

    name: str
    scales: Scales
    signed: bool

    @property
    def zero(self) -> int:
        return _ZERO if self.signed else 0

    @property
    def step(self) -> float:
        """As float32 holds it."""
        return float(np.float32(self.scales.peaks[self.name] / (_SIGNED if self.signed else _UNSIGNED)))

    @property
    def is_known(self) -> bool:
        return self.name in self.scales.peaks

    def measure(self, largest: Tensor) -> None:
        """Note the largest activation, rounded up to 8 bits: by its last digit CPUs may differ."""
        mantissa, exponent = math.frexp(float(largest))
        self.scales.peaks[self.name] = math.ldexp(math.ceil(mantissa * 256) / 256, exponent) or 1.0  # dead: any will do


class _Walk:
    """Replaces layers in the order in which activations pass them."""

    def __init__(self, scales: Scales, means: Mapping[str, Tensor] | None):
        self.scales, self.means = scales, means

    def activations(self, name: str, signed: bool = False) -> _Activations:
        """UserError where its scale is neither known nor to be measured."""
        found = _Activations(name, self.scales, signed)
        if self.means is None and not found.is_known:
            raise UserError(f"the scales of int8 are another network's: there is none for '{name}'")
        return found

    def through(
        self, parent: nn.Module, prefix: str, source: _Activations, but: nn.Module | None = None
    ) -> _Activations:
        """Replace the layers in `parent`, whose input is `source`; returns the place of its output."""
        for name, child in list(parent.named_children()):
            path = f"{prefix}{name}"
            if child is but:
                continue
            if isinstance(child, nn.Conv2d | BasicBlock | Bottleneck):
                is_block = not isinstance(child, nn.Conv2d)
                layer = _Block(child, path, source, self) if is_block else self.convolution(child, path, source)
                setattr(parent, name, layer)
                source = layer.target
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, _MaxPool(child))
            else:
                source = self.through(child, f"{path}.", source)
        return source

    def convolution(self, one: nn.Conv2d, path: str, source: _Activations, signed: bool = False) -> "_Convolution":
        """With a ReLU behind it, unless its output is `signed`."""
        mean = None if self.means is None else self.means[path]
        return _Convolution(one, path, source, self.activations(path, signed), mean)


class _Input(nn.Module):
    """Normalised images [N, C, H, W] as uint8; where gradients are enabled, as they are."""

    def __init__(self, target: _Activations):
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return x
        if not self.target.is_known:
            self.target.measure(x.abs().max())
        return (x / self.target.step).round_().add_(_ZERO).clamp_(0, 255).to(torch.uint8)


class _Convolution(nn.Module):
    """relu(convolution(x) + bias + shortcut), quantised; without the ReLU where its output has both signs."""

    def __init__(
        self, convolution: nn.Conv2d, name: str, source: _Activations, target: _Activations, mean: Tensor | None = None
    ):  # fmt: skip
        super().__init__()
        self.convolution, self.name, self.source, self.target, self.mean = convolution, name, source, target, mean
        self.geometry: Any = (
            list(convolution.stride), list(convolution.padding), list(convolution.dilation), convolution.groups,
        )  # fmt: skip
        weight = convolution.weight.detach().double()
        largest = weight.abs().amax((1, 2, 3)).clamp(min=1e-12)
        self.steps = (largest / _WEIGHT).float()  # [O]
        whole = (weight / self.steps.double().view(-1, 1, 1, 1)).round().clamp(-_WEIGHT, _WEIGHT)
        self.weight = whole.to(torch.int8).contiguous()
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.bias = cast(Tensor, convolution.bias).detach()
        if name in target.scales.shifts:
            self.bias = self.bias + _fitting(target.scales.shifts[name], self.bias, name)
        self._packed: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor, shortcut: Tensor | None = None, at: _Activations | None = None) -> Tensor:
        """uint8 [N, C, H, W], and a shortcut, as `at` says, which is overwritten -> uint8 [N, C', H', W'].

        Where gradients are enabled the convolution alone.
        """
        if torch.is_grad_enabled():
            return self.convolution(x)
        if not self.target.is_known:
            self._measure(x, shortcut, at)
        relu = "none" if self.target.signed else "relu"
        result: Any = (self.target.step, self.target.zero, torch.uint8)
        if shortcut is None or at is None:
            return torch.ops.onednn.qconv2d_pointwise(
                *self._operands(x), self.bias, *self.geometry, *result, relu, [], ""
            )
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *self._operands(x), shortcut, self.bias, *self.geometry, *result, at.step, at.zero, "sum", 1.0, relu, [], ""
        )

    def raw(self, x: Tensor) -> Tensor:
        """convolution(x) + bias, in float32."""
        return torch.ops.onednn.qconv2d_pointwise(
            *self._operands(x), self.bias, *self.geometry, 1.0, 0, torch.float32, "none", [], ""
        )

    def _operands(self, x: Tensor) -> tuple:
        source, shape = self.source, tuple(x.shape)
        if shape not in self._packed:
            self._packed[shape] = torch.ops.onednn.qconv_prepack(
                self.weight.clone(), self.steps, source.step, source.zero, *self.geometry, list(shape)
            )
        return x, source.step, source.zero, self._packed[shape], self.steps, self.zeros

    def _measure(self, x: Tensor, shortcut: Tensor | None, at: _Activations | None) -> None:
        """Shift the bias so that the mean output is the float network's; note the largest output."""
        few = x[::_FEW].contiguous(memory_format=torch.channels_last)
        outputs = [self.raw(part).double() for part in few.split(_AT_ONCE)]
        found = sum(one.sum((0, 2, 3)) for one in outputs) / (len(few) * outputs[0][0, 0].numel())
        grain = self.steps.double() * self.source.step / 16  # of a float sum's last digits nothing is left
        shift = (((cast(Tensor, self.mean) - found) / grain).round() * grain).float()
        self.target.scales.shifts[self.name] = shift
        self.bias = self.bias + shift
        largest = torch.zeros(())
        for begun in range(0, len(x), _AT_ONCE):
            output = self.raw(x[begun : begun + _AT_ONCE])
            if shortcut is not None and at is not None:
                output += (shortcut[begun : begun + _AT_ONCE].float() - at.zero) * at.step
            output = output.abs() if self.target.signed else output
            largest = torch.maximum(largest, output.max())
        self.target.measure(largest)


def _fitting(shift: Tensor, bias: Tensor, name: str) -> Tensor:
    if shift.shape != bias.shape:
        raise UserError(
            f"the scales of int8 are another network's: '{name}' has {len(bias)} channels, not {len(shift)}"
        )
    return shift


class _Block(nn.Module):
    """A BasicBlock or Bottleneck, quantised."""

    def __init__(self, block: BasicBlock | Bottleneck, path: str, source: _Activations, walk: _Walk):
        super().__init__()
        self.block, self.source, self.target = block, source, source
        convolutions = list[_Convolution]()
        for name in ("conv1", "conv2", "conv3"):
            if hasattr(block, name):
                convolutions.append(walk.convolution(getattr(block, name), f"{path}.{name}", self.target))
                self.target = convolutions[-1].target
        self.convolutions = nn.ModuleList(convolutions)
        self.shortcut: _Convolution | None = None
        if block.downsample is not None:
            one = cast(nn.Conv2d, block.downsample[0])
            self.shortcut = walk.convolution(one, f"{path}.downsample.0", source, signed=True)

    def forward(self, x: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> uint8 [N, C', H', W'], channels_last."""
        if torch.is_grad_enabled():
            return self.block(x)
        y = x
        for convolution in self.convolutions[:-1]:
            y = convolution(y)
        if self.shortcut is None:
            return self.convolutions[-1](y, x.clone(), self.source)
        return self.convolutions[-1](y, self.shortcut(x), self.shortcut.target)


class _MaxPool(nn.Module):
    """Of uint8: torch pools floats."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.pool(x)
        return torch.cat([self.pool(part.float()).to(torch.uint8) for part in x.split(_AT_ONCE)])


class _Values(nn.Module):
    """Integers as float32, whose mean over pixels is exact up to its one division."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class _Linear(nn.Module):
    """A linear layer on means of integers: weights and means as integers, whose products float64 sums exactly."""

    def __init__(self, linear: nn.Linear, source: _Activations):
        super().__init__()
        self.linear = linear
        weight = linear.weight.detach().double()
        step = weight.abs().max().clamp(min=1e-12) / _LINEAR_WEIGHT
        self.weight, self.step, self.source = (weight / step).round(), float(step) / _POOLED, source
        self.bias = linear.bias.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        """Means [N, C] -> logits [N, K], float32."""
        if torch.is_grad_enabled():
            return self.linear(x.float())
        sums = (x.double() * _POOLED).round() @ self.weight.T
        return (sums * (self.step * self.source.step) + self.bias).float()
