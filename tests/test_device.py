"""Which GPU a process takes, what a precision's name stands for, when memory is short; no GPU is needed for any."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from children import Children
from conftest import CODES

from spacte import cli
from spacte.device import memory_is_short, select_device
from spacte.precision import arithmetic, select_precision
from spacte.utils import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_it_was():
    """The settings are torch's own, for the whole process."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("name", "device", "settled", "tf32"), [
    ("auto", CPU, "fp32", False), ("auto", CUDA, "tf32", True), ("fp32", CUDA, "fp32", False),
    ("tf32", CUDA, "tf32", True), ("bf16", CUDA, "bf16", False), ("bf16", CPU, "bf16", False),
])  # fmt: skip
def test_auto_is_the_authors_arithmetic_and_fp32_is_ieee(monkeypatch, name, device, settled, tf32):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert select_precision(name, device) == settled
    assert arithmetic()["cudnn_allow_tf32"] is tf32 and arithmetic()["float32_matmul_precision"] == "highest"


def test_a_gpu_that_is_too_old_for_tf32_computes_and_records_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select_precision("auto", CUDA) == "fp32" and arithmetic()["cudnn_allow_tf32"] is False
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.0 or later"):
        select_precision("tf32", CUDA)


@pytest.mark.parametrize("newer", [torch.backends, torch.backends.cudnn, torch.backends.mkldnn.conv])
def test_what_was_set_before_by_newer_names_does_not_hold_beside_a_precision(newer):
    newer.fp32_precision = "tf32"
    select_precision("fp32", CPU)
    assert arithmetic().keys() == {
        "float32_matmul_precision", "cudnn_allow_tf32", "cudnn_deterministic", "cudnn_benchmark",
    }  # fmt: skip
    assert arithmetic()["cudnn_allow_tf32"] is False and arithmetic()["float32_matmul_precision"] == "highest"
    assert "tf32" not in (torch.backends.cudnn.conv.fp32_precision, torch.backends.mkldnn.conv.fp32_precision)


SET_BEFORE = """
import torch
from spacte.device import select_device
from spacte.precision import keep_arithmetic_settings, select_precision

backends = torch.backends
{}
every = [backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
every += [backends.mkldnn.conv, backends.mkldnn.matmul, backends.mkldnn.rnn]
before = [one.fp32_precision for one in every], backends.cudnn.benchmark
with keep_arithmetic_settings():
    select_precision("fp32", select_device("cpu"))
assert ([one.fp32_precision for one in every], backends.cudnn.benchmark) == before
"""


@pytest.mark.parametrize("setting", [
    "", "backends.cudnn.benchmark = True", "torch.set_float32_matmul_precision('high')",
    "backends.cudnn.allow_tf32 = False", "backends.fp32_precision = 'tf32'",
    "backends.cuda.matmul.fp32_precision = 'tf32'", "backends.cudnn.conv.fp32_precision = 'ieee'",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'",
])  # fmt: skip
def test_a_callers_arithmetic_is_kept(setting):
    """In a process of its own, whose settings they are."""
    environment = os.environ | {"PYTHONPATH": str(CODES)}
    done = subprocess.run([sys.executable, "-c", SET_BEFORE.format(setting)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_tf32_is_a_gpus():
    with pytest.raises(UserError, match="choose fp32 or bf16 on the CPU"):
        select_precision("tf32", CPU)


# --- memory ---

WAYS_OF_SAYING_SO = {
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024.00 MiB"): True,
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other call"): True,
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"): True,
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"): True,
    RuntimeError("GET was unable to find an engine to execute this computation"): True,
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"): False,
    torch.AcceleratorError("CUDA error: device-side assert triggered"): False,
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"): False,
    ValueError("CUDA error: out of memory, says a function of the user's"): False,
}


@pytest.mark.parametrize(("error", "short"), WAYS_OF_SAYING_SO.items(), ids=str)
def test_short_memory_is_told_from_other_errors_of_a_gpu(monkeypatch, capsys, error, short):
    """Short memory ends a script with one line; `passes` catches it only if it is a RuntimeError."""
    assert memory_is_short(error) is short
    assert not short or isinstance(error, RuntimeError)

    def command():
        raise error

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what cli.run replaces
    with pytest.raises(SystemExit if short else type(error)):
        cli.run(command)
    assert ("give a smaller --batch_size" in capsys.readouterr().err) is short


# --- which GPU ---

PROCESS = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from spacte.device import select_device
from spacte.distributed import init_distributed
from spacte.utils import UserError

rank, visible = int(os.environ["RANK"]), json.loads(sys.argv[1])
init_distributed()
torch.cuda.is_available = lambda: bool(visible[rank])
torch.cuda.device_count = lambda: len(visible[rank])
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=visible[rank][device.index])
torch.cuda.set_device = lambda device: None
try:
    found = str(select_device("auto"))
except UserError as error:
    found = str(error)
Path(f"{rank}.txt").write_text(found)
"""


@pytest.mark.parametrize(("visible", "found"), [
    ([["a"], ["b"]], ["cuda:0", "cuda:0"]),  # srun --gpus-per-task=1
    ([["a", "b"], ["a", "b"]], ["cuda:0", "cuda:1"]),  # torchrun
    ([["a"], []], ["cuda:0", "cpu"]),
    ([["a"], ["a"]], ["processes 0 and 1 would share a GPU"] * 2),
])  # fmt: skip
def test_each_process_has_a_gpu_of_its_own(tmp_path, visible, found):
    """Processes whose GPUs are made up, by their UUIDs; what they agree on goes through gloo."""
    (tmp_path / "process.py").write_text(PROCESS)
    with Children(tmp_path, tmp_path / "process.py", json.dumps(visible), world=2) as children:
        assert children.exit_codes() == [0, 0]
    for rank, expected in enumerate(found):
        assert (tmp_path / f"{rank}.txt").read_text().startswith(expected)


@pytest.mark.parametrize(("local_rank", "count", "found"), [
    ("3", 1, "cuda:0"), ("3", 4, "cuda:3"), (None, 4, "cuda:0"),
    ("4", 4, "there is no device cuda:4, for torchrun's process 4, here: 4 CUDA devices are visible"),
])  # fmt: skip
def test_the_only_gpu_that_is_visible_is_the_process_own(monkeypatch, local_rank, count, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    try:
        assert str(select_device("cuda")) == found
    except UserError as error:
        assert str(error).startswith(found)
