"""The processes of torchrun: who this one is, what all of them share. Without torchrun there is one."""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from spacte.utils import UserError


def process_rank() -> int:
    """This process's number among those of `torchrun`; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> None:
    """Join the processes that `torchrun` started (gloo between CPUs, nccl between GPUs); nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # one process may wait long for a slow one
        atexit.register(dist.destroy_process_group)


def share_from_main_process(make):
    """`make()` of the main process, in every process; the UserError that it raises there is raised in every one."""
    box = [None]
    if process_rank() == 0:
        try:
            box = [make()]
        except UserError as error:
            box = [error]
    if process_count() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def main_process_first(make):
    """`make()` in every process, in the main one first: what it leaves on disk is there for the others."""
    made = []
    share_from_main_process(lambda: made.append(make()))
    return made[0] if made else make()


def gather_from_processes(value) -> list:
    """Every process's value, in order of rank."""
    values = [value]
    if process_count() > 1:
        values = [None] * process_count()
        dist.all_gather_object(values, value)
    return values


def wait_for_processes() -> None:
    """Return once every process is here."""
    gather_from_processes(None)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The processes' mean of a tensor without gradient; itself where there is one process."""
    if process_count() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= process_count()
    return values


def from_main_process(values: torch.Tensor) -> torch.Tensor:
    """The tensor, overwritten in every process by the main process's; itself where there is one process."""
    if process_count() > 1:
        dist.broadcast(values, src=0)
    return values
