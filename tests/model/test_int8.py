"""int8: the network that its scales describe, to the last bit, whatever computes it; as right as float32's."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import CODES
from test_frozen import CPU, warmed_up
from torch import nn

from spacte.data.sources import open_split
from spacte.model import int8
from spacte.model.checkpoint import load_classifier
from spacte.model.frozen import _folded, freeze, scales_of
from spacte.model.noisy import with_fixed_noise
from spacte.model.scales import calibrate
from spacte.utils import UserError

DIGITS = CODES / "pretrained" / "digits-gaussian-0.50-5-heads.pth"
CIFAR = CODES / "pretrained" / "cifar10-gaussian-0.50-5-heads.pth"


def digits(count=200):
    """A published network of five heads, its scales, noised test images."""
    classifier = load_classifier(DIGITS).classifier
    training, test = (open_split("digits", "./data", train) for train in (True, False))
    return (
        classifier,
        scales_of(classifier, training.evenly_spaced(300)[0], 0.5),
        with_fixed_noise(test.evenly_spaced(count)[0], 0.5),
    )


# --- the plain reference ---


class Reference:
    """The quantised network in plain arithmetic: sums of integers in float64, which holds them, all else in float32."""

    def __init__(self, network, scales):
        self.network, self.scales, self.cut = network, scales, []

    def step(self, name):
        return torch.tensor(self.scales.peaks[name] / (127 if name == "conv1" else 255), dtype=torch.float32)

    def rounded(self, x, name):
        """Activations as integers, and what one of these stands for."""
        step, (low, high) = self.step(name), (-128, 127) if name == "conv1" else (0, 255)
        integers = (x / step).round()
        self.cut.append(float((integers > high).float().mean()))
        return integers.clamp(low, high).double(), step

    def convolved(self, x, one, name):
        integers, step = x
        steps = (one.weight.double().abs().amax((1, 2, 3)) / 64).float()
        weight = (one.weight.double() / steps.double().view(-1, 1, 1, 1)).round()
        sums = F.conv2d(integers, weight, None, one.stride, one.padding, one.dilation, one.groups)
        assert sums.abs().max() < 2**24  # float32 holds them
        return sums.float() * (step * steps).view(-1, 1, 1) + (one.bias + self.scales.shifts[name]).view(-1, 1, 1)

    def block(self, block, x, name):
        q = self.rounded(x, "heads" if re.fullmatch(r"heads\.\d+\.0\.0", name) else name)
        if block.downsample is not None:
            x = self.convolved(q, block.downsample[0], f"{name}.downsample.0")
        y = self.convolved(q, block.conv1, f"{name}.conv1")
        for part in ("conv2", "conv3"):
            if hasattr(block, part):
                y = self.convolved(self.rounded(y.relu(), f"{name}.{part}"), getattr(block, part), f"{name}.{part}")
        return (y + x).relu()

    def stage(self, stage, x, name):
        for number, block in enumerate(stage):
            x = self.block(block, x, f"{name}.{number}")
        return x

    def logits(self, images):
        """Of normalised images."""
        network = self.network
        x = self.convolved(self.rounded(images, "conv1"), network.conv1, "conv1").relu()
        if hasattr(network, "layer3"):  # ImageNet's
            x = F.max_pool2d(x, 3, 2, 1)
        for name in ("layer1", "layer2", "layer3"):
            if hasattr(network, name):
                x = self.stage(getattr(network, name), x, name)
        logits = []
        for number, (stage, linear) in enumerate(network.heads):
            integers, step = self.rounded(self.stage(stage, x, f"heads.{number}.0"), f"heads.{number}.1")
            means = (integers.flatten(2).flip(-1).sum(-1) / integers[0, 0].numel() * 2**12).round()
            unit = float(linear.weight.double().abs().max() / 2**20)
            products = means.unsqueeze(1) * (linear.weight.double() / unit).round()  # [N, K, C]
            sums = products.flip(-1).sum(-1)
            logits.append((sums * (unit / 2**12 * float(step)) + linear.bias.double()).float())
        return torch.stack(logits)


def exact(network, images):
    """Give a network weights and biases, and return scales, for which float32 rounds nothing but what becomes integers.

    All steps are powers of 2, all biases and shifts multiples of what one of a sum's integers stands for.
    """
    scales = calibrate(network, images, 1.0)
    for name, peak in scales.peaks.items():
        largest = 127 if name == "conv1" else 255
        scales.peaks[name] = largest * 2.0 ** math.ceil(math.log2(peak / largest))
    for name, one in network.named_modules():
        if isinstance(one, nn.Conv2d):
            block, _, part = name.rpartition(".")
            source = name if part in ("conv2", "conv3") or not block else block.removesuffix(".downsample")
            source = "heads" if re.fullmatch(r"heads\.\d+\.0\.0", source) else source
            weight = torch.randint(-64, 65, one.weight.shape).float()
            weight[:, 0, 0, 0] = 64  # the largest
            step = 2.0 ** math.ceil(math.log2(float(one.weight.std()) / 32))
            unit = step * scales.peaks[source] / (127 if name == "conv1" else 255)
            one.weight.data = weight * step
            one.bias.data = torch.randint(-2000, 2000, one.bias.shape) * unit
            scales.shifts[name] = torch.randint(-9, 9, one.bias.shape) * unit
    return scales


@torch.inference_mode()
@pytest.mark.parametrize(
    ("arch", "dataset", "shape"),
    [("R14", "CIFAR10", (3, 32, 32)), ("R18", "ImageNet", (3, 64, 64)), ("R50", "ImageNet", (3, 32, 32))],
)
def test_the_logits_are_a_plain_integer_networks_to_the_bit(arch, dataset, shape):
    """On any CPU: nothing is rounded in which two could differ."""
    network = _folded(warmed_up(arch, dataset, shape))[1]
    images = 2 * torch.randn(9, *shape)
    scales = exact(network, images)
    reference = Reference(network, scales)
    expected = reference.logits(images)
    logits = int8.quantise(copy.deepcopy(network), scales.peaks, scales.shifts)(images)
    assert torch.equal(logits, expected) and len(expected.unique()) > 0.9 * expected.numel()
    assert max(reference.cut) > 0.02  # some activations are beyond the largest


@torch.inference_mode()
def test_the_votes_of_a_trained_network_are_a_plain_integer_networks():
    classifier, scales, images = digits()
    normalise, network = _folded(classifier)
    expected = Reference(network, scales).logits(normalise(images))
    logits = freeze(classifier, CPU, "int8", scales=scales)(images)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert torch.equal(logits.sum(0).argmax(-1), expected.sum(0).argmax(-1))
    assert (logits != expected).float().mean() < 0.01  # a CPU may round a product before it is added, or after


def test_sums_never_overflow():
    """The largest activations and weights, of one sign, 18432 products: 16 bits would not hold two products of 127."""
    convolution = nn.Conv2d(2048, 8, 3).requires_grad_(False)
    nn.init.constant_(convolution.weight, 0.5)
    convolution.weight[4:] *= -1
    nn.init.zeros_(convolution.bias)
    maker = int8._Quantiser({"x": 255.0}, {"x": torch.zeros(8)})
    layer = int8._Convolution(convolution, "x", maker.activations("x"), maker)
    with torch.inference_mode():
        found = layer(torch.full((1, 2048, 3, 3), 300.0)).flatten()
    expected = 18432 * 255 * 0.5
    assert found.tolist() == [expected] * 4 + [-expected] * 4
    int8.check_exact()


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (lambda layer, x: _raw(layer, x) - 1, "int8 is not exact on this CPU"),
        (lambda layer, x: torch.ops.onednn.no_such_operator(x), "needs torch's oneDNN on an x86 CPU"),
    ],
)
def test_a_cpu_that_cannot_is_refused(monkeypatch, broken, line):
    monkeypatch.setattr(int8._Convolution, "raw", broken)
    with pytest.raises(UserError, match=line):
        int8.check_exact()


_raw = int8._Convolution.raw


# --- what computes it changes nothing ---


@torch.inference_mode()
def test_threads_batches_and_passes_change_no_bit():
    classifier = load_classifier(CIFAR).classifier
    training, images = torch.rand(40, 3, 32, 32), with_fixed_noise(torch.rand(40, 3, 32, 32), 0.5)
    scales = scales_of(classifier, training, 0.5)
    quantised = freeze(classifier, CPU, "int8", 40, scales=scales)
    expected = quantised(images)
    assert torch.equal(quantised(images[25:]), expected[:, 25:])
    assert torch.equal(copy.deepcopy(quantised)(images), expected)
    try:
        torch.set_num_threads(2)
        assert scales_of(classifier, training, 0.5).sha256 == scales.sha256
        for size in (40, 17):
            quantised = freeze(classifier, CPU, "int8", 40, scales=scales)
            quantised.images_per_pass = size
            assert torch.equal(quantised(images), expected)
            logits, features = quantised.first_logits(images, 2)
            assert torch.equal(logits, expected[:2])
            assert torch.equal(quantised.other_logits(features[7:20], 2), expected[2:, 7:20])
    finally:
        torch.set_num_threads(1)


# --- it is as right as float32's ---


@torch.no_grad()
def test_a_trained_network_hardly_changes():
    classifier, scales, images = digits(360)
    plain, quantised = freeze(classifier, CPU), freeze(classifier, CPU, "int8", scales=scales)
    expected, found = plain(images).sum(0), quantised(images).sum(0)
    assert (expected.argmax(-1) != found.argmax(-1)).sum() <= 5
    assert 0 < (found - expected).abs().mean() < 0.03 * expected.std()


@torch.no_grad()
def test_biases_are_shifted_so_that_mean_outputs_are_the_float_networks():
    classifier, scales, images = digits(1)
    normalise, network = _folded(classifier)
    images = normalise(with_fixed_noise(open_split("digits", "./data", True).evenly_spaced(300)[0], 0.5))
    found, expected = {}, {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, y, name=name: expected.update({name: y.clone()}))
    network(images)
    plain = Reference(_folded(classifier)[1], scales)
    convolved = plain.convolved
    plain.convolved = lambda x, one, name: found.setdefault(name, convolved(x, one, name))
    plain.logits(images)
    assert found.keys() == expected.keys() == scales.shifts.keys()
    for name, shift in scales.shifts.items():
        few = (found[name] - expected[name]).double()[::4][:64]  # the images that say how biases are shifted
        off = few.mean((0, 2, 3)).abs().max()
        assert off < 0.01 * expected[name].std() and off < shift.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "dataset", "shape"),
    [("LeNet", "MNIST", (1, 28, 28)), ("R110", "CIFAR10", (3, 16, 16)), ("R50", "ImageNet", (3, 32, 32))],
)
def test_every_architecture_is_quantised(arch, dataset, shape):
    classifier = warmed_up(arch, dataset, shape, heads=2)
    images = torch.rand(64, *shape)
    scales = scales_of(classifier, images, 0.25)
    convolutions = [name for name, module in classifier[1].named_modules() if isinstance(module, nn.Conv2d)]
    assert scales.shifts.keys() == {*convolutions} and {"conv1", "heads.0.1", "heads.1.1"} <= scales.peaks.keys()
    expected = freeze(classifier, CPU)(with_fixed_noise(images, 0.25))
    found = freeze(classifier, CPU, "int8", 8, scales=scales)(with_fixed_noise(images, 0.25))
    assert 0 < (found - expected).abs().mean() < 0.15 * expected.std()


def test_for_a_gradient_it_is_the_float_network():
    """So that an attack can climb."""
    classifier, scales, images = digits(20)
    plain, quantised = freeze(classifier, CPU), freeze(classifier, CPU, "int8", scales=scales)
    images.requires_grad_()
    assert torch.equal(quantised(images), plain(images))
    gradients = [torch.autograd.grad(one(images).square().sum(), images)[0] for one in (plain, quantised)]
    assert torch.equal(*gradients) and gradients[0].any()
    with torch.no_grad():
        expected = quantised(images)
    assert not torch.equal(expected, plain(images))
    assert torch.equal(quantised(images.detach()), expected)  # no gradient is asked for, whatever torch's mode
