"""Classifiers in fixed passes: a batch goes through the network in passes of one and the same shape, the last padded.

An image's logits then do not depend on how many images share its batch, nothing is compiled twice, and the network's
memory is bounded. The fastest size of a pass on a CPU is measured: spacte.model.pass_size.
"""

import functools
import math
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spacte.device import memory_is_short
from spacte.model.cuda_graph import Graph
from spacte.model.ensemble import classes_of_all
from spacte.precision import autocast

CPU_PIXELS = 2**18  # of a pass on the CPU; R50 at 224x224 then needs 2 GB
_FEW = 4  # how many times smaller passes of a few images are


class FixedPasses(nn.Module):
    """A classifier run in passes of one shape: images [N, C, H, W] -> logits [L, N, K]; subclasses define `logits`."""

    is_graph = False  # whether a pass is a CUDA graph: its Python then runs once

    def __init__(self, device: torch.device, batch_size: int, compiled: bool):
        super().__init__()
        self.device, self.max_pass_size, self.compiled = device, batch_size, compiled
        self.images_per_pass: int | None = None  # on the CPU; None: by CPU_PIXELS
        self.fastest: int | None = None  # what `fastest_pass_size` has found
        self._functions: dict[tuple, Callable] = {}  # what runs a pass: compiled, or as it is

    def logits(self, images: Tensor) -> Tensor:
        """The logits of one pass: [N, C, H, W] -> [L, N, K]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head: [N, C, H, W] -> [L, N, K]. Where gradients are enabled, in one pass as it is."""
        if torch.is_grad_enabled():
            with autocast(self.device, "fp32"):
                return self.logits(images)
        return self.run_in_passes(self.logits, images)[0]

    def logits_of_few(self, images: Tensor) -> Tensor:
        """The same of a few images of a batch, in smaller passes."""
        return self.run_in_passes(self.logits, images, few=True)[0]

    def classes(self, images: Tensor, num_classes: int) -> Tensor:
        """What each head and the ensemble name on each image: [N, C, H, W] -> [V, N]; see `classes_of_all`.

        On a GPU that is a part of a pass's graph.
        """
        if self.is_graph:
            return self.run_in_passes(self._classes, images, num_classes)[0]
        return classes_of_all(self(images), num_classes)

    def _classes(self, images: Tensor, num_classes: int) -> Tensor:
        return classes_of_all(self.logits(images), num_classes)

    def run_in_passes(
        self, stage: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Tensor, *settings: Hashable,
        dims: tuple[int, ...] = (1,), few: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """`stage(inputs, *settings)`, a method of this classifier, in passes of one size, the last one padded.

        The inputs are [N, ...]. Each result of the stage is concatenated along its dimension of N, which `dims` names.
        `few`: the inputs are a few of a batch, so that passes are a quarter as large: padding costs less.
        """
        halved = False
        while True:  # the memory that others leave on a shared GPU is known only by trying
            try:
                size = self.pass_size(inputs)
                if few:
                    size = math.ceil(size / _FEW)
                with autocast(self.device, "fp32"):  # an autocast of the caller's would make it another function
                    found = [self._pass(stage, part, size, settings, dims) for part in inputs.split(size)]
                break
            except RuntimeError as error:
                if self.max_pass_size == 1 or not memory_is_short(error):
                    raise
            if self.compiled:
                torch.compiler.reset()
            self.forget_functions()  # the graphs hold memory of their own
            torch.cuda.empty_cache()
            self.max_pass_size, halved = (self.max_pass_size + 1) // 2, True
        if halved:
            print(
                f"the GPU's memory is short: from here on {self.max_pass_size} images per pass",
                file=sys.stderr,
                flush=True,
            )
        return tuple(concatenated(parts, dim) for parts, dim in zip(zip(*found, strict=True), dims, strict=True))

    def pass_size(self, images: Tensor) -> int:
        """How many images a pass holds; on the CPU the first images decide, unless it is fixed."""
        if self.device.type == "cuda":
            return self.max_pass_size
        if self.images_per_pass is None:
            self.images_per_pass = self.even_pass_size(images, CPU_PIXELS)
        return min(self.max_pass_size, self.images_per_pass)

    def even_pass_size(self, images: Tensor, pixels: int) -> int:
        """The size of passes of about that many pixels, into which a batch is split without much padding."""
        return math.ceil(self.max_pass_size / math.ceil(self.max_pass_size * pixels_of_one(images) / pixels))

    def forget_functions(self) -> None:
        """Forget what runs a pass; it is made again when it is needed."""
        self._functions.clear()

    def _pass(
        self, stage: Callable, inputs: Tensor, size: int, settings: tuple, dims: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        # Libraries choose kernels by shape, and kernels round differently. With one shape, an image has the same logits
        # in every batch: votes do not depend on the batch size, and a resumed run repeats them.
        missing = size - len(inputs)
        padded = F.pad(inputs, (*(0, 0) * (inputs.dim() - 1), 0, missing)) if missing else inputs
        key = (stage.__name__, *settings, *padded.shape)
        if key not in self._functions:
            function: Callable[[Tensor], tuple[Tensor, ...]] = functools.partial(_call, stage, settings)
            if self.compiled:
                function = _compiled(function, self.device)
            elif self.is_graph:
                function = _replayed(function)
            self._functions[key] = function
        results = self._functions[key](padded)
        return tuple(one.narrow(dim, 0, len(inputs)) for one, dim in zip(results, dims, strict=True))


def pixels_of_one(images: Tensor) -> int:
    """How many pixels each of the images has: [N, C, H, W] -> H * W; of another shape, values."""
    return math.prod(images.shape[2:]) if images.dim() > 2 else images.shape[1]


def fixed_pass_modules(network: object) -> list[FixedPasses]:
    """The classifiers in passes that the network is, or that an ensemble holds; of anything but modules none."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return [one for one in modules if isinstance(one, FixedPasses)]


def concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _call(stage: Callable, settings: tuple, inputs: Tensor) -> tuple[Tensor, ...]:
    results = stage(inputs, *settings)
    return results if isinstance(results, tuple) else (results,)


def _replayed(stage: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """`stage`, which needs no gradients, as a CUDA graph, captured when it is called first; as it is if that fails."""
    graph: Graph | None = None
    eager = False

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        """What the stage returns, in memory of its own: the next pass writes to the same place."""
        nonlocal graph, eager
        with torch.inference_mode():
            if eager:
                return stage(inputs)
            if graph is None:
                found = stage(inputs)  # loads the libraries' kernels, and shows whether the memory suffices
                try:
                    graph = Graph(stage, inputs)
                except RuntimeError as error:
                    if memory_is_short(error):
                        raise
                    eager = True
                    why = str(error).partition("\n")[0]
                    warnings.warn(f"a pass that cannot become a CUDA graph runs as it is, slower: {why}", stacklevel=2)
                    return found
            return tuple(one.clone() for one in graph(inputs))

    return run


def _compiled(
    stage: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """`stage` through torch.compile, with the weights as constants and, on a GPU, as a CUDA graph."""
    function = torch.compile(stage, dynamic=False, options={"triton.cudagraphs": device.type == "cuda"})

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        """Compiles when it is called first; each network of an ensemble and each size of a pass for itself."""
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=1000):
            return tuple(one.clone() for one in function(inputs))  # a CUDA graph writes the next pass to the same place

    return run
