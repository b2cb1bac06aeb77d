"""The arithmetic of networks: fp32, tf32, bf16 or int8, and the settings of torch that it depends on."""

import contextlib
import platform
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch

from spacte.distributed import all_gather_object, is_main_process
from spacte.utils import UserError

PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # of training
INFERENCE_PRECISIONS = (*PRECISIONS, "int8")


def select_precision(name: str, device: torch.device) -> str:
    """fp32, tf32, bf16 or int8; "auto" is torch's default and the authors' arithmetic: tf32 on CUDA, fp32 on the CPU.

    fp32 is IEEE float32, to which "auto" falls back on a GPU that is too old for TF32; tf32 lets a GPU's convolutions
    round their float32 inputs to TF32; bf16 computes convolutions and products in bfloat16; int8 is a quantised
    network's (spacte.model.int8). From here on float32 is computed so, whatever was set before: the precision in a log
    is the one that ran. A line says where a CPU emulates bf16. Raises UserError for what the device does not have, and
    where the GPUs of several processes would compute differently. Every process must call it.
    """
    if name == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs a GPU: choose fp32 or bf16 on the CPU")
    if name in ("tf32", "bf16") and device.type == "cuda" and not _is_ampere(device):  # cuDNN has no bf16 there
        raise UserError(f"--precision {name} needs a GPU of compute capability 8.0 or later: choose fp32 here")
    if name == "int8" and device.type != "cpu":
        raise UserError("--precision int8 runs on a CPU only: choose fp32, tf32 or bf16 on a GPU, or --device cpu")
    precision = name if name != "auto" else "tf32" if _is_ampere(device) else "fp32"
    if len(set(all_gather_object(precision))) > 1:
        raise UserError("these GPUs are of generations that --precision auto treats differently: choose fp32")
    if precision == "bf16" and device.type == "cpu" and not _multiplies_bf16() and is_main_process():
        print(
            "this CPU has neither AVX512_BF16 nor AMX (see lscpu) and emulates --precision bf16: fp32 is faster here",
            file=sys.stderr,
        )
    backends: Any = torch.backends  # which torch's types do not know in full
    for backend in (backends, backends.cudnn, backends.mkldnn.conv):
        backend.fp32_precision = "none"  # torch's newer settings would hold beside these two
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def _is_ampere(device: torch.device) -> bool:
    """Whether it is a GPU of that generation or a later one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bfloat16."""
    flags: Any = torch.cpu
    x86 = platform.machine() in ("x86_64", "AMD64")  # of other CPUs torch says nothing
    return not x86 or flags._is_avx512_bf16_supported() or flags._is_amx_tile_supported()


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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks run: bfloat16 convolutions and products for "bf16", none otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def keep_arithmetic_settings() -> Iterator[None]:
    """At its end torch's settings of precision and of cuDNN, which `select_device` and `select_precision` change, are
    as they were.

    Torch has two generations of them over the same state. Where the caller has used the newer one, reading the older
    one can raise; setting one of the newer ones also sets those below it, so that outer ones come first here.
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
