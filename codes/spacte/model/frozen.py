"""Classifiers in fixed passes; a network of ours made fast: BatchNorm folded, channels_last, the user's precision.

On a GPU a pass is a CUDA graph of fused convolutions (spacte.model.fused).

A batch goes through the network in passes of one and the same shape, the last one padded: an image's logits then do
not depend on how many images share its batch, nothing is compiled twice, and the network's memory is bounded.
"""

import copy
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spacte.device import memory_is_short
from spacte.model.ensemble import disagree, named_classes, voters
from spacte.model.fused import fuse
from spacte.model.side_by_side import capture

# of a pass on the CPU: which is the fastest depends on its cache and the network, by up to 1.5 times
_CPU_PIXELS = 2**18  # R50 at 224x224 then needs 2 GB
_FEWER_PIXELS = (2**17, 2**16, 2**15)
_FIT_ANYWHERE = 2**16  # a batch of no more pixels is one pass
_SECONDS_OF_MEASURING = 0.5


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
    images, halved while they do not fit into a GPU's memory; there it is a CUDA graph of fused convolutions.
    `compiled`: through torch.compile, with constants folded.
    """
    normalise, network = copy.deepcopy(classifier).eval().requires_grad_(False)
    for module in list(network.modules()):
        _fold_batchnorm(module)
    network.to(device, torch.bfloat16 if precision == "bf16" else torch.float32, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.float()  # 8 bits of a logit would make ties
    if device.type == "cuda" and not compiled:
        fuse(network, widen=precision != "fp32")
    return Frozen(normalise.to(device), network, device, batch_size, compiled)


class FixedPasses(nn.Module):
    """A classifier run in passes of one shape: images [N, C, H, W] -> logits [L, N, K]; subclasses define `logits`."""

    graphed = False  # whether a pass on a GPU is a CUDA graph: its Python then runs once

    def __init__(self, device: torch.device, batch_size: int, compiled: bool):
        super().__init__()
        self.device, self.most, self.compiled = device, batch_size, compiled
        self.images_per_pass: int | None = None  # on the CPU; None: by _CPU_PIXELS
        self.fastest: int | None = None  # what `fastest_pass` has found
        self._functions: dict[tuple, Callable] = {}  # what runs a pass: compiled, or as it is

    def logits(self, images: Tensor) -> Tensor:
        """The logits of one pass: [N, C, H, W] -> [L, N, K]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head: [N, C, H, W] -> [L, N, K]. Where gradients are enabled, in one pass as it is."""
        if torch.is_grad_enabled():
            return self.logits(images)
        return _joined(self.passes(self._whole, images, reduce=lambda logits: logits))

    def classes(self, images: Tensor, num_classes: int) -> Tensor:
        """What each head and the ensemble name on each image, within the graph of a pass: [N, C, H, W] -> [V, N].

        See `named_classes`.
        """
        return _joined(self.passes(self._classes, images, num_classes, reduce=lambda classes: classes))

    @property
    def is_graph(self) -> bool:
        """Whether a pass is a CUDA graph."""
        return self.graphed and self.device.type == "cuda" and not self.compiled

    def _classes(self, images: Tensor, num_classes: int) -> tuple[Tensor]:
        return (named_classes(voters(self.logits(images).float()), num_classes),)

    def _whole(self, images: Tensor) -> tuple[Tensor]:
        return (self.logits(images),)

    def passes(self, stage: Callable[..., tuple], inputs: Tensor, *settings: int, reduce: Callable) -> list:
        """What `reduce` makes of each pass of the inputs through `stage`: of logits [L, n, K] and, maybe, [n, ...].

        The `settings` are the stage's.
        """
        halved = False
        while True:
            try:
                size = self.pass_size(inputs)
                parts = inputs.split(size)
                found = [reduce(*self._pass(stage, part, size, settings)) for part in parts]
                break
            except RuntimeError as error:
                if self.most == 1 or not memory_is_short(error):
                    raise
            if self.compiled:
                torch.compiler.reset()
            self.forget_functions()  # the graphs hold memory of their own
            torch.cuda.empty_cache()
            self.most, halved = (self.most + 1) // 2, True
        if halved:
            print(f"the GPU's memory is short: from here on {self.most} images a pass", file=sys.stderr, flush=True)
        return found

    def pass_size(self, images: Tensor) -> int:
        """How many images a pass holds; on the CPU the first ones that it is asked for decide, unless it is fixed."""
        if self.device.type == "cuda":
            return self.most
        if self.images_per_pass is None:
            self.images_per_pass = self.even_pass(images, _CPU_PIXELS)
        return min(self.most, self.images_per_pass)

    def even_pass(self, images: Tensor, pixels: int) -> int:
        """The size of passes of about that many pixels, into which a batch is split without much padding."""
        return math.ceil(self.most / math.ceil(self.most * images.shape[-2] * images.shape[-1] / pixels))

    def forget_functions(self) -> None:
        """Make anew, when it is asked for, what runs a pass."""
        self._functions.clear()

    def _pass(self, stage: Callable, inputs: Tensor, size: int, settings: tuple) -> tuple[Tensor, ...]:
        missing = size - len(inputs)
        padded = F.pad(inputs, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else inputs
        key = (stage.__name__, *settings, *padded.shape)
        if key not in self._functions:
            function = functools.partial(_call, stage, settings)
            if self.compiled:
                function = _compiled(function, self.device)
            elif self.is_graph:
                function = _Graph(function)
            self._functions[key] = function
        logits, *others = self._functions[key](padded)
        return logits[:, : len(inputs)], *(one[: len(inputs)] for one in others)


class Frozen(FixedPasses):
    """The network that `freeze` returns."""

    graphed = True

    def __init__(self, normalise: nn.Module, network: nn.Module, device: torch.device, batch_size: int, compiled: bool):
        super().__init__(device, batch_size, compiled)
        self.normalise, self.network = normalise, network
        self.dtype = next(network.parameters()).dtype

    def logits(self, images: Tensor) -> Tensor:
        """See FixedPasses."""
        return self.network(self._normalised(images))

    @property
    def members(self) -> int:
        """How many can take part in a consensus: the heads."""
        return len(self.network.heads)

    def early(self, images: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """See Consensus: the other heads read the trunk's features.

        On the CPU those of the images that need them are kept alone; on a GPU, where that would wait for it, all are.
        """
        sparing = self.device.type != "cuda"

        def kept(logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Of a pass."""
            needed = disagree(logits)
            return logits, features[needed] if sparing else features, needed

        logits, features, needed = zip(*self.passes(self._early, images, first, reduce=kept), strict=True)
        index = torch.cat(needed).nonzero().flatten() if sparing else None
        return _joined(logits), torch.cat(features), index

    def late(self, features: Tensor, first: int) -> Tensor:
        """See Consensus; in passes of the size that the images' passes had."""
        return _joined(self.passes(self._late, features, first, reduce=lambda logits: logits))

    def _early(self, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        features = self.network.trunk(self._normalised(images))
        return self.network.head_logits(features, slice(first)), features

    def _late(self, features: Tensor, first: int) -> tuple[Tensor]:
        return (self.network.head_logits(features.to(memory_format=torch.channels_last), slice(first, None)),)

    def _normalised(self, images: Tensor) -> Tensor:
        return self.normalise(images.to(memory_format=torch.channels_last)).to(self.dtype)


def fix_passes(network: nn.Module, images_per_pass: int | None) -> None:
    """Let the passes of the network, or of each of an ensemble's, hold that many images on the CPU."""
    for one in _in_passes(network):
        one.images_per_pass = images_per_pass


def pass_size(network: nn.Module, image: Tensor) -> int:
    """How many such images [C, H, W] a pass holds, of an ensemble one of its networks'."""
    return _in_passes(network)[0].pass_size(image)


def most_per_pass(network) -> tuple[int, ...]:
    """How many images a pass of the network, or of each of an ensemble's, can hold: fewer once memory was short."""
    return tuple(one.most for one in _in_passes(network)) if isinstance(network, nn.Module) else ()


def fastest_pass(network: nn.Module, image: Tensor) -> int | None:
    """How many images [C, H, W] a pass had best hold on this CPU, by a short measurement; None on a GPU.

    It is measured once, without compiling. A batch that any cache holds is not split, and nothing is measured.
    """
    first = _in_passes(network)[0]
    if first.device.type == "cuda":
        return None
    if first.fastest is None:
        largest = first.even_pass(image, _CPU_PIXELS)
        sizes = sorted({first.even_pass(image, pixels) for pixels in _FEWER_PIXELS} | {largest}, reverse=True)
        fits = first.most * image[0].numel() <= _FIT_ANYWHERE
        first.fastest = largest if fits or len(sizes) == 1 else _measured(network, image, sizes)
    return first.fastest


@torch.inference_mode()
def _measured(network: nn.Module, image: Tensor, sizes: list[int]) -> int:
    """Which of the sizes takes the least time an image."""
    parts = _in_passes(network)
    before = [(one.images_per_pass, one.compiled) for one in parts]
    for one in parts:
        one.compiled = False
        one.forget_functions()  # what has run already is compiled
    batch, seconds = image.expand(max(sizes), *image.shape), dict.fromkeys(sizes, math.inf)
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < _SECONDS_OF_MEASURING:
        for size in sizes:  # in turns, so that what else the machine does hits all alike
            fix_passes(network, size)
            begun = time.perf_counter()
            network(batch)
            padded = size * math.ceil(len(batch) / size)
            seconds[size] = min(seconds[size], (time.perf_counter() - begun) / padded)
        rounds += 1
    for one, (images_per_pass, compiled) in zip(parts, before, strict=True):
        one.images_per_pass, one.compiled = images_per_pass, compiled
        one.forget_functions()
    return min(sizes, key=seconds.get)


def _in_passes(network: nn.Module) -> list[FixedPasses]:
    return [one for one in network.modules() if isinstance(one, FixedPasses)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """What passes made of their images, [L, n, ...] each, as one: [L, N, ...]."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _call(stage: Callable, settings: tuple, inputs: Tensor) -> tuple[Tensor, ...]:
    return stage(inputs, *settings)


class _Graph:
    """A stage without gradients as a CUDA graph, captured when it is called first, for inputs of one shape."""

    def __init__(self, stage: Callable[[Tensor], tuple]):
        self.stage, self.graph = stage, None

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What the stage returns, in memory of its own: the next replay writes to the same place."""
        with torch.inference_mode():
            if self.graph is None:
                self._capture(inputs)
            else:
                self.inputs.copy_(inputs)
            self.graph.replay()
        return tuple(one.clone() for one in self.outputs)

    def _capture(self, inputs: Tensor) -> None:
        self.stage(inputs)  # loads the libraries' kernels, and shows whether the memory suffices
        self.inputs, graph = inputs.clone(), torch.cuda.CUDAGraph()
        with capture(graph):
            self.outputs = self.stage(self.inputs)
        self.graph = graph


def _compiled(stage: Callable[[Tensor], tuple], device: torch.device) -> Callable[[Tensor], tuple]:
    """`stage` through torch.compile, with the weights as constants and, on a GPU, as a CUDA graph."""
    function = torch.compile(stage, dynamic=False, options={"triton.cudagraphs": device.type == "cuda"})

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        """Compiles when it is called first; each network of an ensemble and each size of a pass for itself."""
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=1000):
            return tuple(one.clone() for one in function(inputs))  # a CUDA graph writes the next pass to the same place

    return run


def _fold_batchnorm(module: nn.Module) -> None:
    """Replace each convolution's BatchNorm, the child that follows it, by the identity, and scale its weights."""
    children = list(module.named_children())
    for (name, convolution), (next_name, batchnorm) in itertools.pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(batchnorm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(convolution, batchnorm))
            setattr(module, next_name, nn.Identity())
