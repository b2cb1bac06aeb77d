"""What a precision's name stands for, and a caller's settings of torch; no GPU is needed for either."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import CODES

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


def test_a_gpu_that_is_too_old_for_tf32_and_bf16_computes_and_records_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select_precision("auto", CUDA) == "fp32" and arithmetic()["cudnn_allow_tf32"] is False
    for name in ("tf32", "bf16"):
        with pytest.raises(UserError, match=rf"--precision {name} needs a GPU of compute capability 8\.0 or later"):
            select_precision(name, CUDA)


def test_processes_compute_alike(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("spacte.precision.all_gather_object", lambda value: [value, "fp32"])
    assert select_precision("fp32", CUDA) == "fp32"
    with pytest.raises(UserError, match="generations that --precision auto treats differently: choose fp32"):
        select_precision("auto", CUDA)


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
