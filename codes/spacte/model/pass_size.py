"""How large passes on a CPU are: as requested, as noted by an earlier run, or as a short measurement finds fastest."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from spacte.model.passes import CPU_PIXELS, fixed_pass_modules, pixels_of_one

# which size is the fastest depends on the CPU's cache and the network, by up to 1.5 times
_FEWER_PIXELS = (2**17, 2**16, 2**15)
_FIT_ANYWHERE = 2**16  # a batch of no more pixels is one pass
_SECONDS_OF_MEASURING = 0.5


def set_pass_size(network: Callable[[Tensor], Tensor], images_per_pass: int | None) -> None:
    """Let the passes of the network, or of each of an ensemble's, hold that many images on the CPU."""
    for one in fixed_pass_modules(network):
        one.images_per_pass = images_per_pass


def pass_size(network: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """How many such images [C, H, W] a pass holds, of an ensemble one of its networks'."""
    return fixed_pass_modules(network)[0].pass_size(image[None])


def fastest_pass_size(network: Callable[[Tensor], Tensor], image: Tensor) -> int | None:
    """How many images [C, H, W] per pass are fastest on this CPU, by a short measurement; None on a GPU.

    It is measured once, without compiling. A batch that any cache holds is not split, and nothing is measured.
    """
    first = fixed_pass_modules(network)[0]
    if first.device.type == "cuda":
        return None
    if first.fastest is None:
        largest = first.even_pass_size(image[None], CPU_PIXELS)
        sizes = sorted(
            {first.even_pass_size(image[None], pixels) for pixels in _FEWER_PIXELS} | {largest}, reverse=True
        )
        fits = first.max_pass_size * pixels_of_one(image[None]) <= _FIT_ANYWHERE
        first.fastest = largest if fits or len(sizes) == 1 else _measured(network, image, sizes)
    return first.fastest


@torch.no_grad()
def _measured(network: Callable[[Tensor], Tensor], image: Tensor, sizes: list[int]) -> int:
    """Which of the sizes takes the least time per image."""
    parts = fixed_pass_modules(network)
    before = [(one.images_per_pass, one.compiled) for one in parts]
    for one in parts:
        one.compiled = False
        one.forget_functions()  # what has run already is compiled
    batch, seconds = image.expand(max(sizes), *image.shape), dict.fromkeys(sizes, math.inf)
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < _SECONDS_OF_MEASURING:
        for size in sizes:  # in turn, so that other load on the machine hits all sizes alike
            set_pass_size(network, size)
            begun = time.perf_counter()
            network(batch)
            padded = size * math.ceil(len(batch) / size)
            seconds[size] = min(seconds[size], (time.perf_counter() - begun) / padded)
        rounds += 1
    for one, (images_per_pass, compiled) in zip(parts, before, strict=True):
        one.images_per_pass, one.compiled = images_per_pass, compiled
        one.forget_functions()
    return min(sizes, key=lambda size: seconds[size])
