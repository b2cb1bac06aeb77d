"""The device that networks run on, its random numbers, its memory."""

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator

import torch

from spacte.distributed import all_gather_object, get_world_size
from spacte.utils import UserError

NO_ENGINE = "unable to find an engine"  # cuDNN: for want of memory, or because it has no such kernel
_GPU_PIXELS = 2**22  # of a batch: an H200 certified R110 a quarter faster by 4,096 images than by 1,000


def select_device(name: str, compiled: bool = False) -> torch.device:
    """The device called `name`: auto (CUDA where there is one), cpu, cuda or cuda:<index>; for cuda, the process's GPU.

    Of several processes each has a GPU of its own: the one that LOCAL_RANK numbers, or the only one that it sees. cuDNN
    chooses deterministic algorithms from here on (its fused convolutions, spacte.model.fused, know no such setting).
    Raises UserError for a device that does not exist or is another process's, and where networks are to be `compiled`
    for it but there is no compiler.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device '{name}': choose from auto, cpu, cuda, cuda:<index>")
    if device.type == "cuda":
        if device.index is not None and get_world_size() > 1:
            raise UserError(f"--device {name} would put every process on one GPU: give --device cuda")
        if device.index is None:
            device = torch.device("cuda", _own_index())
    _check_gpu(device, name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if compiled:
        _check_compiler(device)
    return device


def _own_index() -> int:
    """This process's GPU among the visible ones: of several the one that LOCAL_RANK numbers."""
    # torchrun lets its processes see all GPUs; srun --gpus-per-task=1 lets each see its own, which is number 0 to all
    return int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.device_count() > 1 else 0


def _check_gpu(device: torch.device, name: str) -> None:
    """UserError if the device is not there, or another process has it, too. Every process must call it."""
    count = torch.cuda.device_count()
    there = device.type == "cuda" and device.index < count
    # No variable tells two GPUs, each the only one that its process sees, from one that both see: their UUIDs do.
    uuids = all_gather_object(str(torch.cuda.get_device_properties(device).uuid) if there else None)
    if device.type == "cuda" and not there:
        wanted = f"{device}, for torchrun's process {device.index}," if "LOCAL_RANK" in os.environ else f"'{name}'"
        raise UserError(f"there is no device {wanted} here: {count} CUDA devices are visible; use --device cpu")
    shared = [rank for rank, uuid in enumerate(uuids) if uuid is not None and uuids.count(uuid) > 1]
    if shared:
        raise UserError(
            f"processes {shared[0]} and {shared[1]} would share a GPU: start one process for each GPU that is visible, "
            "or use --device cpu"
        )


def _check_compiler(device: torch.device) -> None:
    from torch._inductor import cpp_builder  # here: importing it takes a second

    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # that they are off is our choice
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU")
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        raise UserError("--compile needs a C++ compiler: install g++, or name one in the variable CXX") from error


def default_batch_size(device: torch.device, shape: tuple[int, ...], draws: int) -> int:
    """How many noisy images [C, H, W], or inputs of another shape, a batch has where nobody says: 1,000 on the CPU.

    On a GPU as many as keep it busy: up to 4,096 of CIFAR-10's images, and 256 of ImageNet's, reduced so that the
    `draws` of an image make equal batches, or those of several images one batch: a part that is padded would be
    computed for nothing.
    """
    if device.type == "cpu":
        return 1000
    pixels, fewest = (math.prod(shape[1:]), 256) if len(shape) > 2 else (math.prod(shape), 1)
    most = max(fewest, min(4096, _GPU_PIXELS // pixels))
    return most // draws * draws if draws <= most else math.ceil(draws / math.ceil(draws / most))


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Within it new tensors are float32 and on the CPU where nothing else is said, and nothing is computed in a lower
    precision, whatever the process has set.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's default generators: on the CPU and, if it is another one, on the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Set torch's default generators to states that `rng_state` returned."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def keep_rng_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What is drawn within it from torch's default generators moves no draw after it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def memory_is_short(error: BaseException) -> bool:
    """Whether the error says, in whichever words of torch's parts, that a GPU's memory did not suffice.

    torch's allocator has an error of its own, CUDA itself reports one AcceleratorError among others,
    cuBLAS and cuDNN as a status, and cuDNN may say that it finds no algorithm. The error with which a CUDA graph's
    capture ends may hide the one that ended it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if error.__context__ is not None and memory_is_short(error.__context__):
        return True
    said = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", NO_ENGINE)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)
