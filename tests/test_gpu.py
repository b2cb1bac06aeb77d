"""The same runs on a CUDA device, where there is one."""

import pytest
import torch
from conftest import DEFENCES, TINY

from spacte.device import select_device, select_precision
from spacte.logs.certlog import read_log
from spacte.model import build_classifier
from spacte.model.frozen import freeze

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
CUDA = (*TINY, "--device", "cuda")


@pytest.mark.parametrize("defence", DEFENCES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_and_certification_run_on_a_gpu(script, tmp_path, own_flags, defence, precision):
    flags = (*own_flags(defence), "--num_heads", 2, "--epochs", 2, "--precision", precision)
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


# what a logit may be off, against IEEE float32 on the CPU: TF32 has 10 bits behind the point, bfloat16 has 7
APART = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}


@torch.inference_mode()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", APART)
def test_fast_logits_on_a_gpu_are_the_plain_ones(precision, compiled):
    classifier, device = build_classifier("R20", "CIFAR10", 3).eval(), select_device("cuda")
    select_precision(precision, device)
    images = torch.rand(70, 3, 32, 32)
    frozen = freeze(classifier, device, precision, batch_size=32, compiled=compiled)
    expected = classifier(images)
    for _ in range(2):  # the second time a CUDA graph is replayed
        torch.testing.assert_close(frozen(images.to(device)).cpu(), expected, rtol=APART[precision], atol=APART[precision])
