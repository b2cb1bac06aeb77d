"""The arithmetic that a precision's name stands for; no GPU is needed to set it."""

import pytest
import torch

from spacte.device import arithmetic, select_precision
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
def test_auto_is_the_authors_arithmetic_and_fp32_is_ieee(name, device, settled, tf32):
    assert select_precision(name, device) == settled
    assert arithmetic()["cudnn_allow_tf32"] is tf32 and arithmetic()["float32_matmul_precision"] == "highest"


def test_tf32_is_a_gpus():
    with pytest.raises(UserError, match="choose fp32 or bf16 on the CPU"):
        select_precision("tf32", CPU)
