"""A frozen classifier made fast: BatchNorm folded into the convolutions, channels_last, the user's precision."""

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spacte.utils import autocast


def freeze(classifier: nn.Sequential, device: torch.device, precision: str = "fp32") -> nn.Module:
    """A copy of the classifier for inference on `device`: the same function but for rounding, never trained again.

    images [N, C, H, W] -> logits [L, N, K], float32 or, for precision "bf16", bfloat16.
    """
    frozen = copy.deepcopy(classifier).eval().requires_grad_(False)
    for module in list(frozen.modules()):
        _fold_batchnorm(module)
    return Frozen(frozen.to(device, memory_format=torch.channels_last), device, precision)


class Frozen(nn.Module):
    """The network that `freeze` returns."""

    def __init__(self, classifier: nn.Module, device: torch.device, precision: str):
        super().__init__()
        self.classifier, self.device, self.precision = classifier, device, precision

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head: [N, C, H, W] -> [L, N, K]."""
        with autocast(self.device, self.precision):
            return self.classifier(images.to(memory_format=torch.channels_last))


def _fold_batchnorm(module: nn.Module) -> None:
    """Replace each convolution's BatchNorm, the child that follows it, by the identity, and scale its weights."""
    children = list(module.named_children())
    for (name, convolution), (next_name, batchnorm) in itertools.pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(batchnorm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(convolution, batchnorm))
            setattr(module, next_name, nn.Identity())
