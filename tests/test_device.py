"""Which GPU a process takes, and when its memory is short; no GPU is needed for either."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from children import Children

from spacte import cli
from spacte.device import memory_is_short, select_device
from spacte.utils import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
