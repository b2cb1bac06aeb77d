"""Our networks in int8 on the CPU: convolutions of 8-bit activations and 7-bit weights, with exact sums.

float32 -> uint8 -> convolution -> float32, + shortcut, ReLU -> uint8 -> ... -> mean over pixels -> linear layer

A convolution's input q stands for (q - zero) * step, and step is fixed beforehand, so that an image's logits do not
depend on the images that share its batch. Convolutions are oneDNN's, which sum products of integers in 32 bits and then
scale, add bias and shortcut, and round, all in one pass. CPUs without VNNI add the products of two neighbours in 16
bits: with weights from -64 to 64 these never overflow (2 * 255 * 64 < 2^15), so the sum is exact there, too. The linear
layers multiply integers whose sums float64 holds exactly. What is left to round are products and sums of single
numbers: the order of a sum, which threads and sizes of passes decide, changes nothing. Images must be finite.

Between blocks activations stay float32: 8 bits, rounded again after each of 54 blocks, changed one vote in eight of an
R110; now it is one in thirty.

Sources: Jacob et al. (CVPR 2018), section 2; bias correction, here with data (`shifts`): Nagel et al. (ICCV 2019), 4.2.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from spacte.device import keep_rng_state, torch_defaults
from spacte.model.heads import MultiHeadNetwork
from spacte.utils import UserError

_WEIGHT = 64  # the largest weight
_UNSIGNED, _SIGNED = 255, 127  # the largest activation: after a ReLU, or on either side of the zero
_ZERO = 128  # the zero point of activations of both signs
_HEADS, _INTO_HEADS = "heads", r"heads\.\d+\.0\.0"  # what all heads read, and the blocks that read it
_SHAPES = 4  # of passes, for which weights are kept laid out
_LINEAR_WEIGHT, _POOLED = 2**20, 2**12  # integers of the linear layer: up to 2^20 * 2^20 * 8192 channels = 2^53


def quantise(
    network: MultiHeadNetwork,
    peaks: dict[str, float],
    shifts: dict[str, Tensor],
    means: Mapping[str, Tensor] | None = None,
) -> MultiHeadNetwork:
    """The network, its BatchNorm folded, with its layers quantised by its scales; float32 goes from layer to layer.

    It has no gradients. With `means`, of the float convolutions' outputs, it is calibrated by the images that it sees:
    they enter `peaks` and `shifts`. Raises UserError if these are of another network.
    """
    quantiser = _Quantiser(peaks, shifts, means)
    quantiser.replace(network, "")
    stages = [name for name, child in network.named_children() if isinstance(child, nn.Sequential)]
    if stages:  # the heads' common input is quantised once
        last = cast(nn.Module, getattr(network, stages[-1]))
        setattr(network, stages[-1], nn.Sequential(last, _Quantise(quantiser.activations(_HEADS))))
    for number, head in enumerate(cast(list[nn.Sequential], network.heads)):
        into_linear = quantiser.activations(f"heads.{number}.1")
        head[0] = nn.Sequential(head[0], _Quantise(into_linear, torch.float32))
        head[1] = _Linear(cast(nn.Linear, head[1]), into_linear)
    strange = sorted({*peaks, *shifts} - quantiser.names)
    if strange:
        raise _foreign(f"this one has no '{strange[0]}'")
    return network


@torch_defaults()
def check_exact() -> None:
    """UserError if this machine's torch has no such convolutions, or they do not compute what they should."""
    quantiser = _Quantiser({"x": 127.0, "y": 255.0 * 8192}, {"x": torch.zeros(16), "y": torch.zeros(16)})
    source, target = quantiser.activations("x", signed=True), quantiser.activations("y")  # steps 1 and 8192
    largest = torch.full((2, 64, 4, 4), 127.0)
    try:
        with torch.inference_mode(), keep_rng_state(torch.device("cpu")):  # layers draw their first weights
            for size in (1, 3):
                convolution = nn.Conv2d(64, 16, size, padding=size // 2).requires_grad_(False)
                nn.init.ones_(convolution.weight)
                nn.init.zeros_(cast(Tensor, convolution.bias))
                layer, expected = _Convolution(convolution, "x", source, quantiser), convolution(largest)
                q = source.quantised(largest)
                shortcut = (expected * -0.5).to(memory_format=torch.channels_last)
                found = layer.raw(q), layer.hidden(q, target).float(), layer.onto(q, shortcut)
                wanted = expected, (expected / 8192).round(), expected / 2
                if not all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)):
                    raise UserError("--precision int8 is not exact on this CPU: choose fp32 or bf16")
    except (AttributeError, RuntimeError) as error:
        raise UserError("--precision int8 needs torch's oneDNN on an x86 CPU: choose fp32 or bf16") from error


def _foreign(why: str) -> UserError:
    return UserError(f"the scales of int8 are another network's: {why}")


class _Quantiser:
    """Replaces a network's layers by quantised ones; with `means` these are calibrated by the images that they see."""

    def __init__(self, peaks: dict[str, float], shifts: dict[str, Tensor], means: Mapping[str, Tensor] | None = None):
        self.peaks, self.shifts, self.means, self.names = peaks, shifts, means, set[str]()

    def replace(self, parent: nn.Module, prefix: str) -> None:
        """Quantise the convolutions in `parent`, and the blocks as wholes."""
        for name, child in list(parent.named_children()):
            path = f"{prefix}{name}"
            if isinstance(child, BasicBlock | Bottleneck):
                setattr(parent, name, _Block(child, path, self))
            elif isinstance(child, nn.Conv2d):
                source = self.activations(path, signed=path == "conv1")  # all others follow a ReLU
                setattr(parent, name, _Convolution(child, path, source, self))
            else:
                self.replace(child, f"{path}.")

    def activations(self, name: str, signed: bool = False) -> "_Activations":
        """How activations into a layer are quantised. UserError if their peak is neither known nor measured here."""
        self.names.add(name)
        if self.means is None and name not in self.peaks:
            raise _foreign(f"there is none for '{name}'")
        return _Activations(name, signed, self.peaks, self.means is not None)


@dataclass
class _Activations:
    """How the activations that go into a layer are quantised."""

    name: str
    signed: bool
    peaks: dict[str, float]
    calibrates: bool

    @property
    def zero(self) -> int:
        return _ZERO if self.signed else 0

    @property
    def step(self) -> float:
        """The quantisation step, rounded to float32."""
        return float(np.float32(self.peaks[self.name] / (_SIGNED if self.signed else _UNSIGNED)))

    def quantised(self, x: Tensor) -> Tensor:
        """float32, if not signed at least 0, -> uint8, channels_last; uint8 is quantised already."""
        if x.dtype == torch.uint8:
            return x
        if self.calibrates:
            self._note(float(x.abs().max()))
        q = (x * float(np.float32(1 / self.step))).round_()
        q = q.add_(_ZERO).clamp_(0, 255) if self.signed else q.clamp_(max=_UNSIGNED)
        # by way of int16: torch's conversion from float32 to uint8 takes four times as long
        return q.to(torch.int16, memory_format=torch.channels_last).to(torch.uint8)

    def _note(self, largest: float) -> None:
        """Raise the peak to the largest activation, rounded up to 8 bits: CPUs may differ in the last digits."""
        if not math.isfinite(largest):
            raise UserError(f"--precision int8: activations into '{self.name}' are not finite on training images")
        mantissa, exponent = math.frexp(largest)
        peak = math.ldexp(math.ceil(mantissa * 256) / 256, exponent) or 1e-6  # of a dead layer any will do
        self.peaks[self.name] = max(peak, self.peaks.get(self.name, 0.0))


class _Convolution(nn.Module):
    """A convolution of quantised activations with quantised weights."""

    def __init__(self, convolution: nn.Conv2d, name: str, source: _Activations, quantiser: _Quantiser):
        super().__init__()
        self.name, self.source, self.shifts = name, source, quantiser.shifts
        self.geometry: Any = (
            list(convolution.stride), list(convolution.padding), list(convolution.dilation), convolution.groups,
        )  # fmt: skip
        weight = convolution.weight.detach().double()
        self.steps = (weight.abs().amax((1, 2, 3)).clamp(min=1e-12) / _WEIGHT).float()  # [O]
        whole = (weight / self.steps.double().view(-1, 1, 1, 1)).round().clamp(-_WEIGHT, _WEIGHT)
        self.weight, self.zeros = whole.to(torch.int8), torch.zeros(len(whole), dtype=torch.int64)
        self.bias = cast(Tensor, convolution.bias).detach()
        quantiser.names.add(name)
        self.mean = None if quantiser.means is None else quantiser.means[name]
        if quantiser.means is None and name not in self.shifts:
            raise _foreign(f"there is no shift of '{name}'")
        if name in self.shifts:
            if self.shifts[name].shape != self.bias.shape:
                raise _foreign(f"'{name}' has {len(self.bias)} channels, not {len(self.shifts[name])}")
            self.bias = self.bias + self.shifts[name]
        self._packed: dict[tuple, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: what is laid out for oneDNN cannot be copied, and is laid out again."""
        return vars(self) | {"_packed": {}}

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], float32."""
        return self.raw(self.source.quantised(x))

    def raw(self, x: Tensor) -> Tensor:
        """convolution(x) + bias: uint8 -> float32."""
        self._shift(x)
        return self._run(x, 1.0, torch.float32, "none")

    def hidden(self, x: Tensor, target: _Activations) -> Tensor:
        """relu(convolution(x) + bias), quantised for another layer: uint8 -> uint8."""
        if target.calibrates:
            return target.quantised(self.raw(x).relu_())
        return self._run(x, target.step, torch.uint8, "relu")

    def onto(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(convolution(x) + bias + shortcut), written over the shortcut: uint8, float32 -> float32."""
        self._shift(x)
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *self._operands(x), shortcut, self.bias, *self.geometry, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "relu",
            [], "",
        )  # fmt: skip

    def _run(self, x: Tensor, step: float, kind: torch.dtype, then: str) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            *self._operands(x), self.bias, *self.geometry, step, 0, kind, then, [], ""
        )  # fmt: skip

    def _operands(self, x: Tensor) -> tuple:
        step, zero = self.source.step, self.source.zero
        key = (step, *x.shape)
        if key not in self._packed:
            if len(self._packed) >= _SHAPES:  # each holds the weights again
                self._packed.clear()
            self._packed[key] = torch.ops.onednn.qconv_prepack(
                self.weight.clone(), self.steps, step, zero, *self.geometry, list(x.shape)
            )
        return x, step, zero, self._packed[key], self.steps, self.zeros

    def _shift(self, x: Tensor) -> None:
        """In calibration, at its first batch: shift the bias so that the mean output is the float network's."""
        if self.mean is None or self.name in self.shifts:
            return
        output = self._run(x, 1.0, torch.float32, "none").double().mean((0, 2, 3))
        grain = self.steps.double() * self.source.step / 16  # of a float sum's last digits nothing is left
        self.shifts[self.name] = (((self.mean - output) / grain).round() * grain).float()
        self.bias = self.bias + self.shifts[self.name]


class _Block(nn.Module):
    """A BasicBlock or Bottleneck, quantised within."""

    def __init__(self, block: BasicBlock | Bottleneck, path: str, quantiser: _Quantiser):
        super().__init__()
        self.source = quantiser.activations(_HEADS if re.fullmatch(_INTO_HEADS, path) else path)
        names = [name for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
        sources = [self.source, *(quantiser.activations(f"{path}.{name}") for name in names[1:])]
        self.convolutions = nn.ModuleList(
            _Convolution(getattr(block, name), f"{path}.{name}", source, quantiser)
            for name, source in zip(names, sources, strict=True)
        )
        self.shortcut: _Convolution | None = None
        if block.downsample is not None:
            one = cast(nn.Conv2d, block.downsample[0])
            self.shortcut = _Convolution(one, f"{path}.downsample.0", self.source, quantiser)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], float32.

        Its input is overwritten where it is the shortcut: the stem's output or a block's, which nothing else reads.
        """
        q = self.source.quantised(x)
        if self.shortcut is not None:
            x = self.shortcut.raw(q)
        *before, last = [cast(_Convolution, one) for one in self.convolutions]
        for one, behind in zip(before, [*before[1:], last], strict=True):
            q = one.hidden(q, behind.source)
        return last.onto(q, x)


class _Quantise(nn.Module):
    """Activations as uint8, or as these integers in float32, whose sums are exact: [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, target: _Activations, kind: torch.dtype = torch.uint8):
        super().__init__()
        self.target, self.kind = target, kind

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.target.quantised(x).to(self.kind)


class _Linear(nn.Module):
    """A linear layer on means of integers: weights and means as integers, whose products float64 sums exactly."""

    def __init__(self, linear: nn.Linear, source: _Activations):
        super().__init__()
        self.source = source
        weight = linear.weight.detach().double()
        self.step = float(weight.abs().max().clamp(min=1e-12)) / _LINEAR_WEIGHT
        self.weight, self.bias = (weight / self.step).round(), linear.bias.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        """Means [N, C] -> logits [N, K], float32."""
        sums = (x.double() * _POOLED).round() @ self.weight.T
        return (sums * (self.step / _POOLED * self.source.step) + self.bias).float()
