"""A training step as a CUDA graph: its thousands of kernels are one launch, and no kernel waits for Python."""

import contextlib
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spacte.model.cuda_graph import Graph


class GraphedStep:
    """A trainer's step, (images, labels, epoch, *targets) -> losses by name, replayed as a CUDA graph where it can be.

    The values are those of eager steps, for the draws are the same. Learning rate, lambda and all else that Python
    computes are constants of a graph, so each epoch captures its own. Eager are an epoch's first step, batches that are
    not `full`, and every step where one waits for the GPU, draws or counts on the CPU, or cannot be captured, which is
    said once. The losses lie on the device; the next step overwrites them. `numbers` returns what a step might count
    with: the objective's attributes.
    """

    def __init__(
        self, step: Callable[..., dict[str, Tensor]], full: int, device: torch.device,
        numbers: Callable[[], dict] = dict,
    ):  # fmt: skip
        self.step, self.full, self.numbers = step, full, numbers
        self.stream = torch.cuda.Stream(device)
        self.fit: int | None = None  # the epoch whose steps can be captured
        self.graph: Graph | None = None  # of a step of that epoch
        self.suspected: int | None = None  # the epoch of which one step could not
        self.stopped = False
        # a head's backward pass is in another stream than its parameters' cosine term; autograd waits where it must
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor) -> dict[str, Tensor]:
        """See the class."""
        if len(images) != self.full:
            with uncompiled():
                return self.step(images, labels, epoch, *targets)
        if self.stopped:
            return self.step(images, labels, epoch, *targets)
        if self.fit != epoch:
            self.forget()
            return self._watched(images, labels, epoch, *targets)
        if self.graph is None:
            self._capture(images, labels, epoch, *targets)
        if self.graph is None:
            return self.step(images, labels, epoch, *targets)
        return self.graph(images, labels, *targets)

    @contextlib.contextmanager
    def in_stream(self) -> Iterator[None]:
        """Within it everything runs in the stream that graphs are captured in; steps must be called within it."""
        around = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(around)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            around.wait_stream(self.stream)

    def forget(self) -> None:
        """Give the graph's memory back."""
        self.graph = None

    def _watched(self, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor) -> dict[str, Tensor]:
        """An eager step that shows what a graph could not do: wait for the GPU, of which torch warns here, or draw
        other numbers and count on in Python at every replay.

        An epoch's first step may do so while something is compiled or begun; the second must not.
        """
        before = self._on_cpu()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                losses = self.step(images, labels, epoch, *targets)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [one for one in caught if "called a synchronizing" in str(one.message)]
        for one in caught:
            if one not in waits and "debug mode is a prototype" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        changed = [name for name, value in self._on_cpu().items() if before.get(name) != value]
        if not waits and not changed:
            self.fit = epoch
        elif self.suspected != epoch:
            self.suspected = epoch
        elif waits:
            self._stop(f"something waits for the GPU in line {waits[0].lineno} of '{waits[0].filename}'")
        else:
            self._stop(f"a step changes {', '.join(changed)} on the CPU")
        return losses

    def _on_cpu(self) -> dict[str, bytes]:
        """The states of the CPU's generators, and the numbers."""
        generators: dict[str, Any] = {"torch's generator": torch.get_rng_state().tolist()}
        generators |= {"Python's generator": random.getstate(), "numpy's generator": np.random.get_state()}
        numbers = {name: value for name, value in self.numbers().items() if isinstance(value, int | float | str)}
        return {name: pickle.dumps(value) for name, value in (generators | numbers).items()}

    def _capture(self, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor) -> None:
        def step(images: Tensor, labels: Tensor, *targets: Tensor) -> dict[str, Tensor]:
            return self.step(images, labels, epoch, *targets)

        try:
            self.graph = Graph(step, images, labels, *targets, stream=self.stream)
        except RuntimeError as error:
            generator = torch.cuda.default_generators[self.stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())  # the old one would wait for the capture's end
            self._stop(str(error).splitlines()[0])

    def _stop(self, why: str) -> None:
        self.stopped = True
        tqdm.write(f"no step becomes a CUDA graph, which slows training down: {why}", file=sys.stderr)


def uncompiled() -> contextlib.AbstractContextManager:
    """Within it compiled modules run uncompiled: for sizes that occur once per epoch."""
    nothing_compiled = "torch._dynamo" not in sys.modules  # importing it takes a second
    return contextlib.nullcontext() if nothing_compiled else torch.compiler.set_stance("force_eager")
