"""A few votes on each of many images of a split, all at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from spacte.distributed import all_gather_object, get_rank, get_world_size
from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import VoteRequest
from spacte.utils import derived_seed


def poll(
    smooth: Smooth, split: Any, indices: Sequence[int], n: int, seed: tuple, batch_size: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and votes [N, V, K] of n noisy copies of each of N images; see Smooth.count_votes for V.

    `split[idx]` is an image [C, H, W] in [0, 1] on `split.device` and its label, for each idx of `indices`. Its noise
    is a function of `seed` (a purpose and numbers) and idx alone; `batch_size` noisy copies share a pass. The processes
    of torchrun share the work and all return the same. Raises RunError if logits are not finite.
    """
    labels: dict[int, int] = {}

    def requests() -> Iterator[VoteRequest]:
        """Those of this process, each when it is its turn, so that few are in memory."""
        for idx in indices[get_rank() :: get_world_size()]:
            image, labels[idx] = split[idx]
            generator = torch.Generator(split.device).manual_seed(derived_seed(*seed, idx))
            yield VoteRequest(image, generator, Draws(0, n), idx)

    counted = {done.idx: (labels[done.idx], done.estimation) for done in smooth.count_many(requests(), batch_size)}
    everywhere = {idx: one for part in all_gather_object(counted) for idx, one in part.items()}
    found, votes = zip(*(everywhere[idx] for idx in indices), strict=True)
    return np.array(found), np.stack(votes)
