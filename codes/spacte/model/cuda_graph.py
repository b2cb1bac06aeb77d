"""What a GPU computes as one CUDA graph, and the parts of a network that run side by side within it."""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_STREAMS: dict[int, list[torch.cuda.Stream]] = defaultdict(list)  # of each GPU, for the parts


def side_by_side(parts: Iterable[Callable[[Tensor], Tensor]], inputs: Tensor) -> list[Tensor]:
    """What each part makes of the same inputs, in their order.

    While a CUDA graph is captured each part gets a stream of its own, and so does its backward pass: one small kernel
    fills only a fraction of a GPU, and in a replay Python is not needed to launch kernels. The values are the same.
    Elsewhere the parts come one after another.
    """
    parts = list(parts)
    if torch.compiler.is_compiling() or not inputs.is_cuda or not torch.cuda.is_current_stream_capturing():
        return [part(inputs) for part in parts]
    main, found, streams = torch.cuda.current_stream(), [], _STREAMS[inputs.device.index]
    streams += [torch.cuda.Stream(inputs.device) for _ in range(len(parts) - len(streams))]
    for part, stream in zip(parts, streams, strict=False):
        stream.wait_stream(main)
        inputs.record_stream(stream)  # the allocator must not reuse memory that this stream still reads
        with torch.cuda.stream(stream):
            found.append(part(inputs))
        found[-1].record_stream(main)
    for stream in streams[: len(parts)]:
        main.wait_stream(stream)
    return found


class Graph:
    """A function of tensors, captured for these inputs; a call replays it for others of their shapes.

    Every replay writes its results to the same memory, so a call overwrites what the call before returned.
    """

    def __init__(self, function: Callable, *inputs: Tensor, stream: torch.cuda.Stream | None = None):
        self.inputs, self.graph = [one.clone() for one in inputs], torch.cuda.CUDAGraph()
        device = inputs[0].device
        try:
            with _capture(self.graph, stream or _capture_stream(device)):
                self.outputs = function(*self.inputs)
        except BaseException:
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())  # the old one would wait for the capture's end
            raise

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function returns for the inputs."""
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        self.graph.replay()
        return self.outputs


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream in which this GPU's graphs are captured.

    torch.cuda.graph's own belongs to the GPU that was current when it was first used: work on another GPU would not be
    captured, and each replay would return the results of the first.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is computed within it becomes the graph. An error that is raised within it ends the capture cleanly."""
    # Other threads may continue: pinning the memory of the next batches, say, or watching over NCCL. A capture whose
    # end fails does not give the caller's stream back; the outer context does.
    around, mode = torch.cuda.current_stream(stream.device), "thread_local"
    with torch.cuda.stream(around), torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        try:
            yield
        except BaseException:
            main = torch.cuda.current_stream()
            for one in _STREAMS[main.device_index]:  # a capture that streams have left cannot end, nor free its memory
                with torch.cuda.stream(one):
                    left = torch.cuda.is_current_stream_capturing()
                if left:
                    main.wait_stream(one)
            raise
