"""The processes of torchrun, under torch's own names. Without torchrun there is one, of rank 0.

Only joining them imports torch: logs are merged without.
"""

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from spacte.processes import end_with_parent
from spacte.utils import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_RENDEZVOUS_TIMEOUT, _COLLECTIVE_TIMEOUT = timedelta(minutes=10), timedelta(days=7)


def _several() -> ModuleType | None:
    """torch.distributed where several processes have joined, else None: then torch may not even be there."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() and dist.get_world_size() > 1 else None


def get_rank() -> int:
    """This process's number among those of `torchrun`; 0 where there is one."""
    return dist.get_rank() if (dist := _several()) else 0


def get_world_size() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return dist.get_world_size() if (dist := _several()) else 1


def is_main_process() -> bool:
    """Whether this process is the one that writes logs and checkpoints: rank 0."""
    return get_rank() == 0


def init_distributed() -> None:
    """Join the processes that `torchrun` started (gloo between CPUs, nccl between GPUs); nothing without torchrun.

    They end with torchrun, even a killed one. RunError if it is gone already.
    """
    import torch
    from torch import distributed as dist

    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        end_with_parent()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT))
        except (RuntimeError, ValueError) as error:  # ValueError: RANK, MASTER_ADDR or MASTER_PORT is not set
            said = str(error) or type(error).__name__
            raise RunError(f"torchrun does not answer: {said.splitlines()[0]}") from error
        store.set_timeout(_COLLECTIVE_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
        atexit.register(dist.destroy_process_group)


def on_main_process(make: Callable[[], T]) -> T:
    """Call `make` in the main process, and return what it returns in every process.

    A UserError or RunError that it raises is raised in every process.
    """
    box: list[Any] = [None]
    if is_main_process():
        try:
            box = [make()]
        except (UserError, RunError) as error:
            box = [error]
    if dist := _several():
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError | RunError):
        raise box[0]
    return box[0]


def main_process_first(make: Callable[[], T]) -> T:
    """`make()` in every process, in the main one first: what it leaves on disk is there for the others."""
    made: list[T] = []
    on_main_process(lambda: made.append(make()))
    return made[0] if made else make()


def all_gather_object(value: T) -> list[T]:
    """Every process's value, in order of rank."""
    dist = _several()
    if dist is None:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Return once every process is here."""
    all_gather_object(None)


def all_reduce_mean(values: "Tensor") -> "Tensor":
    """The processes' mean of a tensor without gradient; itself where there is one process."""
    if dist := _several():
        values = values.clone()
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def weighted_by_size(mean: "Tensor", size: int) -> "Tensor":
    """A mean over this process's `size` images, scaled so that the processes' mean is the mean over the whole batch.

    The processes' parts of a batch may differ in size, and DistributedDataParallel averages over processes. Itself
    where there is one process.
    """
    if get_world_size() == 1:
        return mean
    own_size = mean.new_full((), size)
    return mean * (own_size / all_reduce_mean(own_size))


def broadcast(values: "Tensor") -> "Tensor":
    """The tensor, overwritten in every process by the main process's; itself where there is one process."""
    if dist := _several():
        dist.broadcast(values, src=0)
    return values
