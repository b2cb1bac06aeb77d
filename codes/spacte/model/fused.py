"""Residual blocks as a GPU runs them fastest: bias, residual and ReLU within the convolution, few channels widened.

A block of folded convolutions is bound by memory on a GPU, not by arithmetic. cuDNN's fused convolutions write each
result once. For 16 channels it has only a slow kernel, which took half of R110's time on an H200. Two neighbouring
pixels of a row, which lie side by side in memory, are therefore taken as one of twice the channels: [N, H, W, C] is
[N, H, W/2, 2C] without a copy. The convolution's weights are laid out to match, with zeros where two pixels do not
meet, so the function stays what it was except for the order in which its sums round.
"""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from spacte.device import NO_ENGINE, memory_is_short
from spacte.model.heads import MultiHeadNetwork

_CHANNELS = 32  # what a convolution with fewer is widened to
_APART = 0.1  # of the logits' range: in bf16 an R110's lie .02 apart by rounding


@torch.no_grad()
def fuse(network: MultiHeadNetwork, widen: bool, probe: Tensor) -> None:
    """Let the stem and the blocks of a network on a GPU, its BatchNorm folded, run as the module says.

    Where gradients are enabled they run as before. They always do if the fused network fails on the images `probe` [N,
    C, H, W] or computes something else, which a warning says: versions of cuDNN and cards differ. `widen` pays only on
    tensor cores: elsewhere the added products with zeros cost as much as is saved.
    """
    expected = network(probe)
    stem = cast(nn.Conv2d, network.conv1)
    network.conv1 = _FusedConvolution(stem, widen)  # the ReLU that follows it changes nothing any more
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if isinstance(module, BasicBlock | Bottleneck):
                setattr(parent, name, _FusedBlock(module, widen))
    wrong = _what_is_wrong(network, probe, expected)
    for module in network.modules():
        if isinstance(module, _FusedConvolution):
            module.has_kernel = wrong is None  # whatever cuDNN has for the probe's shape
    if wrong:
        warnings.warn(f"all convolutions run unfused, slower, because cuDNN's fused ones {wrong}", stacklevel=2)


def _what_is_wrong(network: nn.Module, probe: Tensor, expected: Tensor) -> str | None:
    """What a fused network does that the plain one, whose logits are `expected`, does not."""
    try:
        apart = (network(probe) - expected).abs().max()
    except RuntimeError as error:  # where memory is short, smaller passes are tried later
        return None if memory_is_short(error) else "fail: " + str(error).partition("\n")[0]
    if apart <= _APART * (expected.max() - expected.min()):
        return None
    return f"compute something else: logits differ by {float(apart):.2g}"


class _FusedBlock(nn.Module):
    """A BasicBlock or Bottleneck without BatchNorm."""

    def __init__(self, block: BasicBlock | Bottleneck, widen: bool):
        super().__init__()
        self.block = block
        convolutions = [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
        self.convolutions = nn.ModuleList(_FusedConvolution(one, widen) for one in convolutions)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], channels_last."""
        if torch.is_grad_enabled():
            return self.block(x)
        y, shortcut = x, self.block.downsample
        for convolution in self.convolutions[:-1]:
            y = convolution(y)
        return self.convolutions[-1](y, x if shortcut is None else shortcut(x))


class _FusedConvolution(nn.Module):
    """relu(convolution(x) + bias + residual); the convolution alone where gradients are enabled.

    Unfused from when cuDNN says that it has no kernel for it.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, convolution: nn.Conv2d, widen: bool):
        super().__init__()
        self.convolution, self.has_kernel = convolution, True
        self.pixels = _pixels(convolution) if widen else 1
        if self.pixels > 1:
            weight = widened(convolution.weight.detach(), self.pixels)
            self.register_buffer("weight", weight.to(memory_format=torch.channels_last), persistent=False)
            self.register_buffer("bias", _bias(convolution).detach().repeat(self.pixels), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and optionally a residual of the result's shape -> [N, C', H', W']."""
        if torch.is_grad_enabled():
            return self.convolution(x)
        if self.has_kernel:
            try:
                return self._in_one_kernel(x, residual)
            except RuntimeError as error:  # of short memory cuDNN says the same: smaller passes are tried then
                if NO_ENGINE not in str(error) or not _memory_is_ample(x):
                    raise
            self.has_kernel = False
            warnings.warn("cuDNN has no fused kernel for some convolutions: they run unfused, slower", stacklevel=2)
        y = self.convolution(x)
        return (y if residual is None else y + residual).relu()

    def _in_one_kernel(self, x: Tensor, residual: Tensor | None) -> Tensor:
        one, pixels = self.convolution, self.pixels
        if pixels == 1 or x.shape[-1] % pixels:
            return _fused(x, one.weight, _bias(one), residual, one)
        residual = None if residual is None else joined(residual, pixels)
        return separated(_fused(joined(x, pixels), self.weight, self.bias, residual, one), pixels)


def _fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, like: nn.Conv2d) -> Tensor:
    geometry: Any = (like.stride, like.padding, like.dilation, like.groups)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def _memory_is_ample(x: Tensor) -> bool:
    """Whether 16 times as much memory is free as these inputs fill: what cuDNN's kernels need is a part of that."""
    free = torch.cuda.mem_get_info(x.device)[0]
    free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return free > 16 * x.numel() * x.element_size()


def _bias(convolution: nn.Conv2d) -> Tensor:
    """The bias that a folded BatchNorm has left."""
    return cast(Tensor, convolution.bias)


def _pixels(convolution: nn.Conv2d) -> int:
    """How many pixels of a row become one: a power of 2, and 1 unless the convolution is 3x3 of stride 1."""
    plain = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    if plain != ((3, 3), (1, 1), (1, 1), (1, 1)) or convolution.groups > 1:
        return 1
    return max(1, 2 ** (_CHANNELS // convolution.out_channels).bit_length() // 2)


def joined(x: Tensor, pixels: int) -> Tensor:
    """Each `pixels` neighbours of a row as one pixel: [N, C, H, W] -> [N, pixels * C, H, W / pixels], channels_last.

    A view of a channels_last tensor. Channel i * C + c is channel c of the i-th of them.
    """
    n, c, height, width = x.shape
    rows = x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # [N, H, W, C]
    return rows.reshape(n, height, width // pixels, pixels * c).permute(0, 3, 1, 2)


def separated(x: Tensor, pixels: int) -> Tensor:
    """The inverse of `joined`: [N, pixels * C, H, W] -> [N, C, H, pixels * W]."""
    n, c, height, width = x.shape
    rows = x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return rows.reshape(n, height, width * pixels, c // pixels).permute(0, 3, 1, 2)


def widened(weight: Tensor, pixels: int) -> Tensor:
    """Weights [O, C, 3, 3] for what `joined` returns: [pixels * O, pixels * C, 3, 3], the same function.

    Pixel j of a joined one sees the neighbours j - 1, j and j + 1: they lie in the joined pixel itself, or at its
    borders in the one before or after.
    """
    out, channels = weight.shape[:2]
    wide = weight.new_zeros(pixels, out, pixels, channels, 3, 3)
    for j in range(pixels):
        for tap in range(3):
            where, i = divmod(j + tap - 1, pixels)  # -1, 0 or 1: the joined pixel, and which of its pixels
            wide[j, :, i, :, :, where + 1] = weight[..., tap]
    return wide.view(pixels * out, pixels * channels, 3, 3)
