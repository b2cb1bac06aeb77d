"""Parts of a network that do not wait for each other, side by side on a GPU."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def side_by_side(parts: Iterable[Callable[[Tensor], Tensor]], inputs: Tensor) -> list[Tensor]:
    """What each part makes of the same inputs, in their order.

    While a CUDA graph is captured each part gets a stream of its own, and so does its backward pass: one small kernel
    fills a fraction of a GPU, and a graph's replays have no host that could be too slow. The values are the same.
    Elsewhere the parts come one after another.
    """
    parts = list(parts)
    if torch.compiler.is_compiling() or not inputs.is_cuda or not torch.cuda.is_current_stream_capturing():
        return [part(inputs) for part in parts]
    main, found = torch.cuda.current_stream(), []
    streams = _streams(inputs.device.index, len(parts))
    for part, stream in zip(parts, streams, strict=True):
        stream.wait_stream(main)
        inputs.record_stream(stream)  # the allocator must not reuse memory that this stream still reads
        with torch.cuda.stream(stream):
            found.append(part(inputs))
        found[-1].record_stream(main)
    for stream in streams:
        main.wait_stream(stream)
    return found


@functools.cache
def _streams(index: int, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(index) for _ in range(count)]
