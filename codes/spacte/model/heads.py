"""One trunk, many heads: the base class of all networks."""

import functools
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from spacte.model.cuda_graph import side_by_side


def make_stage(
    block: type[BasicBlock] | type[Bottleneck], in_planes: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    """A residual stage of torchvision blocks; the first one halves the image if `stride` is 2."""
    out_planes = planes * block.expansion
    shortcut = None
    if stride != 1 or in_planes != out_planes:
        shortcut = nn.Sequential(conv1x1(in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))
    return nn.Sequential(
        block(in_planes, planes, stride, shortcut), *(block(out_planes, planes) for _ in range(blocks - 1))
    )


class MultiHeadNetwork(nn.Module):
    """A network whose last stage and linear layer exist once per head.

    Subclasses build the stem and the shared stages and define `trunk`. A head is `Sequential(stage, linear)`
    with global average pooling in between, so that its keys are `heads.{h}.0.{block}...` and `heads.{h}.1.weight`.

    A loss that is the mean over L heads (eps = 1 - 1/L, the paper's .8 for five) gives each head's own parameters 1/L
    of the gradient that a network of one head would give them, as if they had 1/L of its learning rate; the trunk,
    which all heads train, gets as much as with one head. That is the paper's loss. With `whole_gradient` a head's
    parameters get L times the gradient that comes through its logits; the trunk's gradient, the cosine constraint's and
    weight decay stay as they are.

    Source: arXiv 2211.10882, section 3; weights are initialised as in He et al. (2015), fan-out.
    """

    heads: nn.ModuleList
    min_size: int  # the smallest image side, in pixels, that leaves the last stage something to see
    max_size: int | None = None  # the largest, where there is one
    whole_gradient = False
    frozen_trunk = False

    def trunk(self, images: Tensor) -> Tensor:
        """Features that all heads read: [N, C, H, W] -> [N, C', H', W']."""
        raise NotImplementedError

    def freeze_trunk(self) -> None:
        """Keep training from changing anything but the heads: neither parameters nor BatchNorm's statistics."""
        self.frozen_trunk = True
        for module in self._trunk_modules():
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, except for a frozen trunk."""
        super().train(mode)
        if self.frozen_trunk:
            for module in self._trunk_modules():
                module.eval()
        return self

    def _trunk_modules(self) -> list[nn.Module]:
        return [module for module in self.children() if module is not self.heads]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head: [N, C, H, W] -> [L, N, K]."""
        return self.head_logits(self.trunk(images))

    def head_logits(self, features: Tensor, heads: range | None = None) -> Tensor:
        """Logits of some heads, of all by default, from the trunk's features: [N, C', H', W'] -> [L, N, K]."""
        whole = self.whole_gradient and torch.is_grad_enabled()
        if whole:
            features = _ScaledGradient.apply(features, 1 / len(self.heads))
        which = range(len(self.heads)) if heads is None else heads
        chosen = [cast(tuple[nn.Module, nn.Linear], self.heads[head]) for head in which]
        logits = torch.stack(side_by_side([functools.partial(_logits, *head) for head in chosen], features))
        return _ScaledGradient.apply(logits, len(self.heads)) if whole else logits

    def cosine_loss(self) -> Tensor:
        """L_cos = sum over head pairs h < g of cos^2(theta_h, theta_g), a scalar; 0 for one head.

        theta_h is the vector of all parameters of head h, biases and BatchNorm's too.
        """
        parameters = torch.stack([torch.cat([_flat(p) for p in head.parameters()]) for head in self.heads])  # [L, P]
        directions = F.normalize(parameters, dim=1)
        return (directions @ directions.T).square().triu(diagonal=1).sum()

    def initialise(self) -> None:
        """Draw He-normal (fan-out) convolutions; BatchNorm starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is `factor` times what it gets."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _flat(parameter: Tensor) -> Tensor:
    """A parameter as a vector, in an order that copies nothing where the layout is channels_last."""
    return (parameter.permute(0, 2, 3, 1) if parameter.dim() == 4 else parameter).flatten()


def _logits(stage: nn.Module, linear: nn.Linear, features: Tensor) -> Tensor:
    """A head's logits: [N, C', H', W'] -> [N, K]."""
    pooled = F.adaptive_avg_pool2d(stage(features), 1).flatten(1)  # [N, C]
    return linear(pooled.to(linear.weight.dtype))
