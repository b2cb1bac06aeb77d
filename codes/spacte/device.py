"""The device that networks run on, the arithmetic on it, its random numbers, its memory."""

import contextlib
import importlib.util
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch

from spacte.distributed import all_gather_object, get_world_size, is_main_process
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
    """UserError if the device is not there, or another process has it, too; every process must ask."""
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


PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # of training
INFERENCE_PRECISIONS = (*PRECISIONS, "int8")


def select_precision(name: str, device: torch.device) -> str:
    """fp32, tf32, bf16 or int8; "auto" is torch's default and the authors' arithmetic: tf32 on CUDA, fp32 on the CPU.

    fp32 is IEEE float32, to which "auto" falls back on a GPU that is too old for TF32; tf32 lets a GPU's convolutions
    round their float32 inputs to TF32; bf16 computes convolutions and products in bfloat16; int8 is a quantised
    network's (spacte.model.int8). From here on float32 is computed so, whatever was set before: the precision in a log
    is the one that ran. A line says where bf16 is slow. Raises UserError for tf32 where there is none, and for int8 on
    a GPU.
    """
    if name == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs a GPU: choose fp32 or bf16 on the CPU")
    if name == "tf32" and not _has_tf32(device):
        raise UserError("--precision tf32 needs a GPU of compute capability 8.0 or later: choose fp32 here")
    if name == "int8" and device.type != "cpu":
        raise UserError("--precision int8 runs on a CPU only: choose fp32, tf32 or bf16 on a GPU, or --device cpu")
    precision = name if name != "auto" else "tf32" if _has_tf32(device) else "fp32"
    if precision == "bf16" and device.type == "cpu" and not _multiplies_bf16() and is_main_process():
        print(
            "this CPU has neither AVX512_BF16 nor AMX (see lscpu) and emulates --precision bf16: fp32 is faster here",
            file=sys.stderr,
        )
    backends: Any = torch.backends  # which torch's types do not know in full
    for of_others in (backends, backends.cudnn, backends.mkldnn.conv):
        of_others.fp32_precision = "none"  # torch's newer settings would hold beside these two
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere


def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bfloat16."""
    flags: Any = torch.cpu
    x86 = platform.machine() in ("x86_64", "AMD64")  # of other CPUs torch says nothing
    return not x86 or flags._is_avx512_bf16_supported() or flags._is_amx_tile_supported()


def _check_compiler(device: torch.device) -> None:
    from torch._inductor import cpp_builder  # here: importing it takes a second

    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # that they are off is our choice
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU")
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        raise UserError("--compile needs a C++ compiler: install g++, or name one in the variable CXX") from error


def arithmetic() -> dict[str, bool | str]:
    """The settings that decide how the network's arithmetic rounds, as they are now, for the record."""
    settings: dict[str, bool | str] = {
        "float32_matmul_precision": _matmul_precision(),
        "cudnn_allow_tf32": _cudnn_allow_tf32(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    backends: Any = torch.backends
    on_cpu = backends.mkldnn.conv.fp32_precision
    if on_cpu not in ("none", "ieee"):  # otherwise left out: older runs have not recorded it, and still resume
        settings["mkldnn_conv_fp32_precision"] = on_cpu
    return settings


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's older setting, asked for, is at odds with its newer ones, which hold
        backends: Any = torch.backends
        return f"{backends.cuda.matmul.fp32_precision} on CUDA, {backends.mkldnn.matmul.fp32_precision} on CPU"


def _cudnn_allow_tf32() -> bool | str:
    cudnn: Any = torch.backends.cudnn
    try:
        return cudnn.allow_tf32
    except RuntimeError:  # as above
        return f"{cudnn.conv.fp32_precision} in convolutions, {cudnn.rnn.fp32_precision} in recurrent layers"


def default_batch_size(device: torch.device, shape: tuple[int, ...], draws: int) -> int:
    """How many noisy images [C, H, W], or inputs of another shape, a batch has where nobody says: 1,000 on the CPU.

    On a GPU as many as keep it busy: up to 4,096 of CIFAR-10's images, and 256 of ImageNet's. The `draws` of an image
    then fill whole batches, or one batch is filled by whole images: a part of a batch would be computed for nothing.
    """
    if device.type == "cpu":
        return 1000
    pixels, fewest = (math.prod(shape[1:]), 256) if len(shape) > 2 else (math.prod(shape), 1)
    most = max(fewest, min(4096, _GPU_PIXELS // pixels))
    return most // draws * draws if draws <= most else math.ceil(draws / math.ceil(draws / most))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks run: bfloat16 convolutions and products for "bf16", none otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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


@contextlib.contextmanager
def keep_arithmetic_settings() -> Iterator[None]:
    """At its end torch's settings of precision and of cuDNN, which `select_device` and `select_precision` change, are
    as they were.
    """
    backends: Any = torch.backends
    newer = [backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul]  # each before those that follow it
    newer += [backends.cudnn.conv, backends.cudnn.rnn]
    newer += [backends.mkldnn.conv, backends.mkldnn.matmul, backends.mkldnn.rnn]
    before, kept = arithmetic(), [one.fp32_precision for one in newer]
    try:
        yield
    finally:
        if before["float32_matmul_precision"] in ("highest", "high", "medium"):  # else set by the newer ones
            torch.set_float32_matmul_precision(cast(str, before["float32_matmul_precision"]))
        if isinstance(before["cudnn_allow_tf32"], bool):
            torch.backends.cudnn.allow_tf32 = before["cudnn_allow_tf32"]
        torch.backends.cudnn.deterministic = cast(bool, before["cudnn_deterministic"])
        torch.backends.cudnn.benchmark = cast(bool, before["cudnn_benchmark"])
        for one, value in zip(newer, kept, strict=True):
            if one.fp32_precision != value:
                one.fp32_precision = value


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
