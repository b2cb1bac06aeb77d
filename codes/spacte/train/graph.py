"""A training step as a CUDA graph: its thousands of kernels are one launch, and no kernel waits for Python."""

import contextlib
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spacte.model.cuda_graph import Graph


class GraphedStep:
    """A trainer's step, (images, labels, epoch, *targets) -> losses by name, replayed as a CUDA graph where it can be.

    A replay draws the same random numbers as an eager step and returns the same values. Learning rate, lambda and all
    else that Python computes are constants of a graph, so each epoch captures its own, one for each of the `full` sizes
    of a mini-batch. An epoch's first step is eager, and so are mini-batches of other sizes. If steps wait for the GPU,
    draw or count on the CPU, or cannot be captured, all are eager from then on, and a line on stderr says why. No
    defence here does so, but a user's may, and a replay would silently leave out what Python did.

    The losses lie on the device; the next step overwrites them. `attributes`, the objective's own dictionary, holds by
    name what a step might count in or keep.
    """

    def __init__(
        self, step: Callable[..., dict[str, Tensor]], full: set[int], device: torch.device,
        attributes: Mapping[str, object],
    ):  # fmt: skip
        self.step, self.full, self.attributes = step, full, attributes
        self.stream = torch.cuda.Stream(device)
        self.capturable: int | None = None  # the epoch whose steps can be captured
        self.graphs: dict[int, Graph] = {}  # of steps of that epoch, by their sizes
        self.failed_once: int | None = None  # the epoch of which one step could not
        self.stopped = False
        # a head's backward pass is in another stream than its parameters' cosine term; autograd waits where it must
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor) -> dict[str, Tensor]:
        """See the class."""
        if len(images) not in self.full:  # of an epoch's last batch: the graphs' memory is free for it
            self.forget()
            with uncompiled():
                return self.step(images, labels, epoch, *targets)
        if not self.stopped and self.capturable != epoch:
            self.forget()
            return self._eager_and_inspected(images, labels, epoch, *targets)
        if not self.stopped and len(images) not in self.graphs:
            self._capture(images, labels, epoch, *targets)  # which may stop it
        if self.stopped:
            return self.step(images, labels, epoch, *targets)
        return self.graphs[len(images)](images, labels, *targets)

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
        """Give the graphs' memory back."""
        self.graphs.clear()

    def _eager_and_inspected(self, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor) -> dict[str, Tensor]:
        """An eager step, watched for what a graph's replays could not do: wait for the GPU (torch warns of it here),
        draw new random numbers on the CPU, count in Python, or keep a new tensor there.

        An epoch's first step may do so, while something is compiled or set up; its second must not.
        """
        before = self._in_python()
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
        changed = [name for name, seen in self._in_python().items() if name not in before or before[name] != seen]
        if not waits and not changed:
            self.capturable = epoch
        elif self.failed_once != epoch:
            self.failed_once = epoch
        elif waits:
            self._stop(f"something waits for the GPU in line {waits[0].lineno} of '{waits[0].filename}'")
        else:
            self._stop(f"a step changes {', '.join(changed)} in Python")
        return losses

    def _in_python(self) -> dict[str, object]:
        """The states of the CPU's generators, and the attributes."""
        states: dict[str, object] = {"torch's": torch.get_rng_state().tolist(), "Python's": random.getstate()}
        states["numpy's"] = np.random.get_state()
        generators = {f"{whose} generator": pickle.dumps(state) for whose, state in states.items()}
        return {name: _snapshot(value) for name, value in {**generators, **self.attributes}.items()}

    def _capture(self, images: Tensor, labels: Tensor, epoch: int, *targets: Tensor) -> None:
        def step(images: Tensor, labels: Tensor, *targets: Tensor) -> dict[str, Tensor]:
            return self.step(images, labels, epoch, *targets)

        try:
            self.graphs[len(images)] = Graph(step, images, labels, *targets, stream=self.stream)
        except RuntimeError as error:
            self._stop(str(error).partition("\n")[0])

    def _stop(self, why: str) -> None:
        self.stopped = True
        self.forget()
        tqdm.write(f"no step becomes a CUDA graph, which slows training down: {why}", file=sys.stderr)


@dataclass(frozen=True, eq=False)
class _ById:
    """A value that equals only itself, and a tensor only if it has not been written to since.

    Writes to a tensor on a GPU are not counted, because a graph repeats them at every replay.
    """

    value: object  # kept alive, so that no other object gets its address
    writes: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value and self.writes == other.writes


def _snapshot(value: object) -> object:
    """What a value holds now, comparable with what it holds later: numbers and texts by value, also in lists, tuples,
    sets and dictionaries; everything else by identity, tensors on the CPU also by how often they were written to.
    """
    if isinstance(value, dict):
        return [(repr(key), _snapshot(own)) for key, own in value.items()]
    if isinstance(value, list | tuple | set):
        return [_snapshot(own) for own in value]
    if isinstance(value, int | float | str | bytes | None):
        return repr(value)  # NaN differs from itself
    if isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_inference():
        return _ById(value, value._version)
    return _ById(value, 0)


def uncompiled() -> contextlib.AbstractContextManager:
    """Within it compiled modules run uncompiled: for sizes that occur once per epoch."""
    nothing_compiled = "torch._dynamo" not in sys.modules  # importing it takes a second
    return contextlib.nullcontext() if nothing_compiled else torch.compiler.set_stance("force_eager")
