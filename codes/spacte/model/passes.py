"""Classifiers in fixed passes: a batch goes through the network in passes of one and the same shape, the last padded.

An image's logits then do not depend on how many images share its batch, nothing is compiled twice, and the network's
memory is bounded. The fastest size of a pass on a CPU is measured.
"""

import functools
import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spacte.device import memory_is_short
from spacte.model.cuda_graph import Graph
from spacte.model.ensemble import named_classes, voters

# of a pass on the CPU: which is the fastest depends on its cache and the network, by up to 1.5 times
_CPU_PIXELS = 2**18  # R50 at 224x224 then needs 2 GB
_FEWER_PIXELS = (2**17, 2**16, 2**15)
_FIT_ANYWHERE = 2**16  # a batch of no more pixels is one pass
_SECONDS_OF_MEASURING = 0.5


class FixedPasses(nn.Module):
    """A classifier run in passes of one shape: images [N, C, H, W] -> logits [L, N, K]; subclasses define `logits`."""

    is_graph = False  # whether a pass is a CUDA graph: its Python then runs once

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
        return concatenated(self.passes(self._whole, images, reduce=lambda logits: logits), 1)

    def classes(self, images: Tensor, num_classes: int) -> Tensor:
        """What each head and the ensemble name on each image, within the graph of a pass: [N, C, H, W] -> [V, N].

        See `named_classes`.
        """
        return concatenated(self.passes(self._classes, images, num_classes, reduce=lambda classes: classes), 1)

    def _classes(self, images: Tensor, num_classes: int) -> tuple[Tensor]:
        return (named_classes(voters(self.logits(images).float()), num_classes),)

    def _whole(self, images: Tensor) -> tuple[Tensor]:
        return (self.logits(images),)

    def passes(self, stage: Callable[..., tuple], inputs: Tensor, *settings: int, reduce: Callable) -> list:
        """What `reduce` makes of each pass of the inputs through `stage`: of logits [L, n, K] and perhaps [n, ...].

        The `settings` are the stage's.
        """
        halved = False
        while True:  # the memory that others leave on a shared GPU is known only by trying
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
            print(f"the GPU's memory is short: from here on {self.most} images per pass", file=sys.stderr, flush=True)
        return found

    def pass_size(self, images: Tensor) -> int:
        """How many images a pass holds; on the CPU the first images decide, unless it is fixed."""
        if self.device.type == "cuda":
            return self.most
        if self.images_per_pass is None:
            self.images_per_pass = self.even_pass(images, _CPU_PIXELS)
        return min(self.most, self.images_per_pass)

    def even_pass(self, images: Tensor, pixels: int) -> int:
        """The size of passes of about that many pixels, into which a batch is split without much padding."""
        of_one = math.prod(images.shape[2:]) if images.dim() > 2 else images.shape[1]
        return math.ceil(self.most / math.ceil(self.most * of_one / pixels))

    def forget_functions(self) -> None:
        """Forget what runs a pass; it is made again when it is needed."""
        self._functions.clear()

    def _pass(self, stage: Callable, inputs: Tensor, size: int, settings: tuple) -> tuple[Tensor, ...]:
        # Libraries choose kernels by shape, and kernels round differently. With one shape, an image has the same logits
        # in every batch: votes do not depend on the batch size, and a resumed run repeats them.
        missing = size - len(inputs)
        padded = F.pad(inputs, (*(0, 0) * (inputs.dim() - 1), 0, missing)) if missing else inputs
        key = (stage.__name__, *settings, *padded.shape)
        if key not in self._functions:
            function = functools.partial(_call, stage, settings)
            if self.compiled:
                function = _compiled(function, self.device)
            elif self.is_graph:
                function = _replayed(function)
            self._functions[key] = function
        logits, *others = self._functions[key](padded)
        return logits[:, : len(inputs)], *(one[: len(inputs)] for one in others)


def fix_passes(network: nn.Module, images_per_pass: int | None) -> None:
    """Let the passes of the network, or of each of an ensemble's, hold that many images on the CPU."""
    for one in in_passes(network):
        one.images_per_pass = images_per_pass


def pass_size(network: nn.Module, image: Tensor) -> int:
    """How many such images [C, H, W] a pass holds, of an ensemble one of its networks'."""
    return in_passes(network)[0].pass_size(image[None])


def fastest_pass(network: nn.Module, image: Tensor) -> int | None:
    """How many images [C, H, W] per pass are fastest on this CPU, by a short measurement; None on a GPU.

    It is measured once, without compiling. A batch that any cache holds is not split, and nothing is measured.
    """
    first = in_passes(network)[0]
    if first.device.type == "cuda":
        return None
    if first.fastest is None:
        largest = first.even_pass(image[None], _CPU_PIXELS)
        sizes = sorted({first.even_pass(image[None], pixels) for pixels in _FEWER_PIXELS} | {largest}, reverse=True)
        fits = first.most * image[0].numel() <= _FIT_ANYWHERE
        first.fastest = largest if fits or len(sizes) == 1 else _measured(network, image, sizes)
    return first.fastest


@torch.inference_mode()
def _measured(network: nn.Module, image: Tensor, sizes: list[int]) -> int:
    """Which of the sizes takes the least time per image."""
    parts = in_passes(network)
    before = [(one.images_per_pass, one.compiled) for one in parts]
    for one in parts:
        one.compiled = False
        one.forget_functions()  # what has run already is compiled
    batch, seconds = image.expand(max(sizes), *image.shape), dict.fromkeys(sizes, math.inf)
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < _SECONDS_OF_MEASURING:
        for size in sizes:  # in turn, so that other load on the machine hits all sizes alike
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


def in_passes(network) -> list[FixedPasses]:
    """The classifiers in passes that the network is, or that an ensemble holds; of anything but modules none."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return [one for one in modules if isinstance(one, FixedPasses)]


def concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _call(stage: Callable, settings: tuple, inputs: Tensor) -> tuple[Tensor, ...]:
    return stage(inputs, *settings)


def _replayed(stage: Callable[[Tensor], tuple]) -> Callable[[Tensor], tuple]:
    """`stage`, which needs no gradients, as a CUDA graph, captured when it is called first."""
    graph: Graph | None = None

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        """What the stage returns, in memory of its own: the next pass writes to the same place."""
        nonlocal graph
        with torch.inference_mode():
            if graph is None:
                stage(inputs)  # loads the libraries' kernels, and shows whether the memory suffices
                graph = Graph(stage, inputs)
            outputs = graph(inputs)
        return tuple(one.clone() for one in outputs)

    return run


def _compiled(stage: Callable[[Tensor], tuple], device: torch.device) -> Callable[[Tensor], tuple]:
    """`stage` through torch.compile, with the weights as constants and, on a GPU, as a CUDA graph."""
    function = torch.compile(stage, dynamic=False, options={"triton.cudagraphs": device.type == "cuda"})

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        """Compiles when it is called first; each network of an ensemble and each size of a pass for itself."""
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=1000):
            return tuple(one.clone() for one in function(inputs))  # a CUDA graph writes the next pass to the same place

    return run
