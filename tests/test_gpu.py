"""The same runs on a CUDA device, where there is one."""

import pytest
import torch
from conftest import TINY

from spacte.certlog import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
CUDA = (*TINY, "--device", "cuda")


@pytest.mark.parametrize("defence", ["0Gaussian", "1Consistency", "2SmoothMix"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_and_certification_run_on_a_gpu(script, tmp_path, defence, precision):
    flags = ("--num_heads", 2, "--epochs", 2, "--precision", precision)
    code, _, err = script(f"{defence}/train.py", *CUDA, *flags)
    assert code == 0, err
    (path,) = (tmp_path / "save").rglob("epoch2.pth")
    certify = ("--model_path", path, "--skip", 60, "--N", 1000, "--device", "cuda", "--precision", precision)
    for extra in ((), ("--sequential", "--overwrite"), ("--exact_noise", "--overwrite")):
        code, _, err = script(f"{defence}/certify_mhead.py", *certify, *extra)
        assert code == 0, err
    (log,) = (tmp_path / "logs").rglob("*skip-60.log")
    assert len(read_log(log)) == 6


def test_a_run_on_a_gpu_is_resumed(script, tmp_path):
    assert script("0Gaussian/train.py", *CUDA, "--num_heads", 2, "--epochs", 1)[0] == 0
    code, out, err = script("0Gaussian/train.py", *CUDA, "--num_heads", 2, "--epochs", 1, "--resume")
    assert code == 0 and "nothing is left to do" in out, err
