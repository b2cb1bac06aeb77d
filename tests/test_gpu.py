"""The same runs on a CUDA device, where there is one."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEFENCES, TINY

from spacte.device import select_device
from spacte.logs.certlog import read_log
from spacte.model import build_classifier
from spacte.model.frozen import freeze
from spacte.precision import select_precision
from spacte.train.graph import GraphedStep

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
    """To the last bit: weights, momentum and the GPU's random numbers."""
    flags = (*CUDA, "--num_heads", 2, "--epochs", 3, "--save_freq", 1)
    assert script("0Gaussian/train.py", *flags)[0] == 0
    paths = {int(path.stem[5:]): path for path in (tmp_path / "save").rglob("epoch*.pth")}
    whole = torch.load(paths[3], weights_only=True, map_location="cpu")
    paths[2].unlink()
    paths[3].unlink()
    code, _, err = script("0Gaussian/train.py", *flags, "--resume")
    assert code == 0, err
    again = torch.load(paths[3], weights_only=True, map_location="cpu")
    assert all(torch.equal(again["state_dict"][name], value) for name, value in whole["state_dict"].items())
    assert torch.equal(again["rng"][0]["cuda"], whole["rng"][0]["cuda"])
    code, out, err = script("0Gaussian/train.py", *flags, "--resume")
    assert code == 0 and "nothing is left to do" in out, err


def losses_of(log):
    """The figures of each epoch but its speed."""
    return pd.read_csv(io.StringIO(log), sep="\t").drop(columns="images_per_second")


BEYOND_THE_PAPER = ("--paced_by", "self", "--pace_share", 0.5, "--whole_gradient", "--eps", 0.667)


@pytest.mark.parametrize(
    ("defence", "more"), [*((defence, ()) for defence in DEFENCES), ("0Gaussian", BEYOND_THE_PAPER)]
)
def test_captured_steps_are_the_eager_ones_to_the_last_bit(script, tmp_path, own_flags, digits_models, defence, more):
    more += ("--teachers", *[digits_models[1]] * 3) if more else ()
    flags = (*CUDA, *own_flags(defence), "--num_heads", 3, "--epochs", 3, "--precision", "bf16", *more)
    found = []
    for extra in ((), ("--no_cuda_graph",)):
        code, _, err = script(f"{defence}/train.py", *flags, "--save_dir", f"save{len(found)}", *extra)
        assert code == 0 and "CUDA graph" not in err, err
        (path,) = (tmp_path / f"save{len(found)}").rglob("epoch3.pth")
        found.append(torch.load(path, weights_only=False, map_location="cpu"))
    captured, eager = found
    pd.testing.assert_frame_equal(losses_of(captured["log"]), losses_of(eager["log"]), check_exact=True)
    for name, value in eager["state_dict"].items():
        assert torch.equal(captured["state_dict"][name], value), name
    for ours, theirs in zip(captured["rng"], eager["rng"], strict=True):
        assert torch.equal(ours["cuda"], theirs["cuda"])


def waits(images, counter):
    return images + float(images.sum())


def draws_on_the_cpu(images, counter):
    return images * torch.rand(())


def draws_with_numpy(images, counter):
    return images * float(np.random.beta(1, 1))


def counts(images, counter):
    counter["steps"] += 1
    return images * counter["steps"]


def keeps_another_tensor(images, counter):
    counter["mean"] = 0.9 * counter.get("mean", 0) + images.mean()
    return images * counter["mean"]


def keeps_another_in_a_list(images, counter):
    counter.setdefault("queue", []).append(images.mean())
    return images * torch.stack(counter["queue"][-2:]).mean()


def fails(images, counter):
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("made to fail\nsecond line")
    return images


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (waits, "something waits for the GPU in line"),
        (draws_on_the_cpu, "changes torch's generator in Python"),
        (draws_with_numpy, "changes numpy's generator in Python"),
        (counts, "changes steps in Python"),
        (keeps_another_tensor, "changes mean in Python"),
        (keeps_another_in_a_list, "changes queue in Python"),
        (fails, "made to fail"),
    ],
)
def test_a_step_that_cannot_be_captured_stays_eager(capsys, body, reason):
    device, counter = select_device("cuda"), {"steps": 0}

    def step(images, labels, epoch):
        return {"loss": (body(images, counter) + torch.randn_like(images)).mean()}

    graphed, images = GraphedStep(step, {4}, device, counter), torch.rand(4, 3, device=device)
    found = []
    for run in (graphed, step):
        torch.manual_seed(3)
        np.random.seed(3)
        counter.clear()
        counter["steps"] = 0
        with graphed.in_stream():
            found.append([float(run(images, images[:, 0], 1)["loss"]) for _ in range(6)])
    assert graphed.stopped and found[0] == found[1]
    (line,) = capsys.readouterr().err.splitlines()
    assert "no step becomes a CUDA graph" in line and reason in line


# how far logits may lie from IEEE float32's on the CPU, relative to their norm
APART = {"fp32": 3e-6, "tf32": 4e-3, "bf16": 4e-2}


@torch.inference_mode()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", APART)
def test_fast_logits_on_a_gpu_are_the_plain_ones(precision, compiled):
    classifier, device = build_classifier("R20", "CIFAR10", 3).eval(), select_device("cuda")
    select_precision(precision, device)
    for module in classifier.modules():  # statistics that folding must not ignore
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    images = torch.rand(70, 3, 32, 32)
    frozen = freeze(classifier, device, precision, batch_size=32, compiled=compiled)
    expected = classifier(images)
    for _ in range(2):  # the second time a CUDA graph is replayed
        logits = frozen(images.to(device)).cpu()
        assert float((logits - expected).norm() / expected.norm()) < APART[precision]


@torch.inference_mode()
@pytest.mark.parametrize("precision", APART)
def test_a_fused_convolution_reads_no_memory_that_nobody_has_written(precision):
    """torch hands cuDNN the result's memory as the residual, times 0: a kernel that multiplies makes NaN of NaN."""
    device, kind = select_device("cuda"), torch.bfloat16 if precision == "bf16" else torch.float32
    select_precision(precision, device)
    x, weight, bias = (torch.randn(size, device=device, dtype=kind) for size in ((16, 32, 16, 16), (32, 32, 3, 3), 32))
    x, weight = (one.to(memory_format=torch.channels_last) for one in (x, weight))
    expected = torch.conv2d(x, weight, bias, padding=1).relu()
    for _ in range(8):
        never_seen = torch.full_like(expected, torch.nan)
        del never_seen  # the next result gets its memory
        found = torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)
        assert float((found - expected).norm() / expected.norm()) < APART[precision]


@torch.inference_mode()
def test_passes_are_halved_where_memory_is_short_in_a_head_that_is_captured(capsys):
    device, failures = select_device("cuda"), [torch.OutOfMemoryError(), torch.OutOfMemoryError()]

    def run_out_of_memory(module, inputs):
        if failures and torch.cuda.is_current_stream_capturing():
            raise failures.pop()

    select_precision("fp32", device)
    frozen, images = freeze(build_classifier("R8", "digits", 4).eval(), device, batch_size=64), torch.rand(64, 1, 8, 8)
    expected = frozen(images.to(device))
    frozen.forget_functions()
    frozen.network.heads[2][0].register_forward_pre_hook(run_out_of_memory)
    for _ in range(2):
        torch.testing.assert_close(frozen(images.to(device)), expected, rtol=1e-4, atol=1e-4)
    assert frozen.max_pass_size == 16 and torch.cuda.current_stream() == torch.cuda.default_stream()
    assert "from here on 16 images per pass" in capsys.readouterr().err
