"""A GPU's fused convolutions, by cuDNN's operators as their definition says: the plain ones, or not used."""

import pytest
import torch
import torch.nn.functional as F
from test_frozen import CPU, warmed_up

from spacte.model.frozen import freeze
from spacte.model.fused import fuse


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize(
    ("arch", "dataset", "shape"),
    [
        ("R20", "CIFAR10", (3, 32, 32)),
        ("R20", "CIFAR10", (3, 30, 21)),  # such a row is not made of pairs of pixels
        ("R8", "digits", (1, 8, 8)),
        ("R18", "ImageNet", (3, 64, 64)),
        ("R50", "ImageNet", (3, 64, 64)),
    ],
)
def test_a_gpus_fused_convolutions_are_the_plain_ones(monkeypatch, arch, dataset, shape, widen):
    """With cuDNN's two operators as their definition says."""

    def convolution_relu(x, weight, bias, *geometry):
        assert x.is_contiguous(memory_format=torch.channels_last), "cuDNN would copy"
        widths.add(weight.shape[0])
        return F.conv2d(x, weight, bias, *geometry).relu().to(memory_format=torch.channels_last)

    def convolution_add_relu(x, weight, z, alpha, bias, *geometry):
        assert x.shape[-1] == z.shape[-1] and z.is_contiguous(memory_format=torch.channels_last)
        widths.add(weight.shape[0])
        return (F.conv2d(x, weight, bias, *geometry) + alpha * z).relu().to(memory_format=torch.channels_last)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolution_add_relu)
    widths, frozen = set(), freeze(warmed_up(arch, dataset, shape), CPU, batch_size=4)
    images = torch.rand(9, *shape, requires_grad=True)
    before = frozen(images)
    (wanted,) = torch.autograd.grad(before.sum(), images)
    fuse(frozen.network, widen, torch.rand(2, *shape).to(memory_format=torch.channels_last))
    assert widths, "they ran on the probe"
    widths.clear()
    (gradient,) = torch.autograd.grad(frozen(images).sum(), images)
    assert torch.equal(gradient, wanted) and not widths, "an attack's gradients are those of the plain convolutions"
    with torch.inference_mode():
        logits = frozen(images)
    expected = before.detach()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * max(1, float(expected.abs().max())))
    assert (16 in widths) == (arch in ("R8", "R20") and not (widen and shape[-1] % 2 == 0))


@torch.inference_mode()
@pytest.mark.parametrize("free", [2**10, 2**30])
def test_where_cudnn_has_no_fused_kernel_and_memory_enough_blocks_run_unfused(monkeypatch, recwarn, free):
    """Of short memory it says the same: then smaller passes are to be tried, and the error goes on."""

    def no_engine(*args):
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", no_engine)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", no_engine)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**36))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    frozen, images = freeze(warmed_up("R8", "digits", (1, 8, 8)), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    expected = frozen(images)
    fuse(frozen.network, widen=True, probe=images)
    if free < 2**20:
        with pytest.raises(RuntimeError, match="unable to find an engine"):
            frozen.logits(images)
        return
    assert torch.equal(frozen(images), expected)
    assert {str(one.message) for one in recwarn} == {
        "cuDNN has no fused kernel for some convolutions: they run unfused, slower"
    }


def without_bias(x, weight, bias, *geometry):
    return F.conv2d(x, weight, None, *geometry).relu()


def without_relu(x, weight, bias, *geometry):
    return F.conv2d(x, weight, bias, *geometry)


def of_memory_that_nobody_has_written(x, weight, bias, *geometry):
    return F.conv2d(x, weight, bias, *geometry) * torch.nan


def not_there(*args):
    raise NotImplementedError("Could not run 'aten::cudnn_convolution_relu'\nfurther lines")


@torch.inference_mode()
@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (without_bias, "compute something else: logits differ by "),
        (without_relu, "compute something else: logits differ by "),
        (of_memory_that_nobody_has_written, "compute something else: logits differ by nan"),
        (not_there, "fail: Could not run 'aten::cudnn_convolution_relu'"),
    ],
)
def test_where_fused_convolutions_are_not_the_plain_ones_all_run_unfused(monkeypatch, recwarn, operator, reason):
    """One of cuDNN's two operators is wrong here."""

    def add_relu(x, weight, z, alpha, bias, *geometry):
        return (F.conv2d(x, weight, bias, *geometry) + z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", operator)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    frozen, images = freeze(warmed_up("R20", "CIFAR10", (3, 32, 32)), CPU, batch_size=4), torch.rand(9, 3, 32, 32)
    expected = frozen(images)
    fuse(frozen.network, widen=True, probe=images[:2])
    assert torch.equal(frozen(images), expected)
    (line,) = {str(one.message) for one in recwarn}
    assert line.startswith(f"all convolutions run unfused, slower, because cuDNN's fused ones {reason}")
    assert "\n" not in line
