"""Classifiers in fixed passes; a network of ours made fast: BatchNorm folded, channels_last, the user's precision.

A batch goes through the network in passes of one and the same shape, the last one padded: an image's logits then do
not depend on how many images share its batch, nothing is compiled twice, and the network's memory is bounded.
"""

import copy
import itertools
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_CPU_PIXELS = 2**18  # of a pass on the CPU: the fastest of 2^15 to 2^20; R50 at 224x224 then needs 2 GB


def freeze(
    classifier: nn.Sequential,
    device: torch.device,
    precision: str = "fp32",
    batch_size: int = 1000,
    compiled: bool = False,
) -> nn.Module:
    """A copy of `Sequential(normalise, network)` for inference: the same function but for rounding, never trained.

    images [N, C, H, W] -> logits [L, N, K], float32. `precision` "bf16" computes in bfloat16 between the normalisation
    and the linear layers (fp32 and tf32 are settings of the device: spacte.device). A pass has at most `batch_size`
    images, halved while they do not fit into a GPU's memory.
    `compiled`: through torch.compile, with constants folded and, on a GPU, as a CUDA graph.
    """
    normalise, network = copy.deepcopy(classifier).eval().requires_grad_(False)
    for module in list(network.modules()):
        _fold_batchnorm(module)
    network.to(device, torch.bfloat16 if precision == "bf16" else torch.float32, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.float()  # 8 bits of a logit would make ties
    return Frozen(normalise.to(device), network, device, batch_size, compiled)


class FixedPasses(nn.Module):
    """A classifier run in passes of one shape: images [N, C, H, W] -> logits [L, N, K]; subclasses define `logits`."""

    def __init__(self, device: torch.device, batch_size: int, compiled: bool):
        super().__init__()
        self.device, self.most, self.compiled = device, batch_size, compiled
        self.run = _compiled(self.logits, device) if compiled else self.logits

    def logits(self, images: Tensor) -> Tensor:
        """The logits of one pass: [N, C, H, W] -> [L, N, K]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head: [N, C, H, W] -> [L, N, K]. Where gradients are enabled, in one pass as it is."""
        if torch.is_grad_enabled():
            return self.logits(images)
        halved = False
        while True:
            try:
                logits = [self._pass(part) for part in images.split(self.pass_size(images))]
                break
            except RuntimeError as error:
                if self.most == 1 or not _memory_is_short(error):
                    raise
            if self.compiled:
                torch.compiler.reset()  # the graphs hold memory of their own
                self.run = _compiled(self.logits, self.device)
            torch.cuda.empty_cache()
            self.most, halved = (self.most + 1) // 2, True
        if halved:
            print(f"the GPU's memory is short: from here on {self.most} images a pass", file=sys.stderr, flush=True)
        return torch.cat(logits, dim=1)

    def pass_size(self, images: Tensor) -> int:
        """How many of these images a pass holds."""
        if self.device.type == "cuda":
            return self.most
        pixels = images.shape[-2] * images.shape[-1]
        return math.ceil(self.most / math.ceil(self.most * pixels / _CPU_PIXELS))

    def _pass(self, images: Tensor) -> Tensor:
        missing = self.pass_size(images) - len(images)
        padded = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images
        return self.run(padded)[:, : len(images)]


class Frozen(FixedPasses):
    """The network that `freeze` returns."""

    def __init__(self, normalise: nn.Module, network: nn.Module, device: torch.device, batch_size: int, compiled: bool):
        super().__init__(device, batch_size, compiled)
        self.normalise, self.network = normalise, network
        self.dtype = next(network.parameters()).dtype

    def logits(self, images: Tensor) -> Tensor:
        """See FixedPasses."""
        normalised = self.normalise(images.to(memory_format=torch.channels_last))
        return self.network(normalised.to(self.dtype))


def _memory_is_short(error: RuntimeError) -> bool:
    """Whether a GPU's memory did not suffice; cuDNN then says that it finds no algorithm."""
    return isinstance(error, torch.OutOfMemoryError) or "unable to find an engine" in str(error)


def _compiled(logits: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """`logits` through torch.compile, with the weights as constants and, on a GPU, as a CUDA graph."""
    function = torch.compile(logits, dynamic=False, options={"triton.cudagraphs": device.type == "cuda"})

    def run(images: Tensor) -> Tensor:
        """Compiles when it is called first; each network of an ensemble and each size of a pass for itself."""
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=1000):
            return function(images).clone()  # a CUDA graph writes the next pass to the same place

    return run


def _fold_batchnorm(module: nn.Module) -> None:
    """Replace each convolution's BatchNorm, the child that follows it, by the identity, and scale its weights."""
    children = list(module.named_children())
    for (name, convolution), (next_name, batchnorm) in itertools.pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(batchnorm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(convolution, batchnorm))
            setattr(module, next_name, nn.Identity())
