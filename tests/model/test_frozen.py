"""The fast path computes the plain network's function, whatever shares its batches."""

import importlib
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, without_time

from spacte.model import build_classifier
from spacte.model.checkpoint import load_classifier
from spacte.model.ensemble import named_classes, with_ensemble
from spacte.model.frozen import freeze
from spacte.model.fused import fuse
from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import Sample
from spacte.utils import UserError

CPU = torch.device("cpu")


def warmed_up(arch: str, dataset: str, shape: tuple[int, ...], heads: int = 3):
    """A classifier whose BatchNorm has seen something, with weights and biases that are not the identity's."""
    classifier = build_classifier(arch, dataset, heads).train()
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        for _ in range(8):
            classifier(torch.rand(16, *shape))
    return classifier.eval()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("arch", "dataset", "shape"),
    [
        ("R20", "CIFAR10", (3, 32, 32)),
        ("R110", "CIFAR10", (3, 32, 32)),
        ("R8", "digits", (1, 8, 8)),
        ("R18", "ImageNet", (3, 64, 64)),
        ("R50", "ImageNet", (3, 64, 64)),
    ],
)
def test_fast_logits_are_the_plain_ones(arch, dataset, shape):
    plain = warmed_up(arch, dataset, shape)
    images = torch.rand(9, *shape) + 0.25 * torch.randn(9, *shape)
    expected, logits = plain(images), freeze(plain, CPU, batch_size=4)(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * max(1, float(expected.abs().max())))


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


@torch.inference_mode()
def test_classes_are_those_of_the_logits():
    """What a GPU's graphs compute in place of the logits, in passes of 4 of 9 images."""
    frozen, images = freeze(warmed_up("R8", "digits", (1, 8, 8)), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    logits = with_ensemble(frozen(images))
    assert frozen.classes(images, 10).tolist() == logits.argmax(-1).tolist()
    for place, wrong in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[1, place, 2] = wrong
    named = named_classes(logits, 10)
    assert (named == 10).nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]


@torch.inference_mode()
def test_fast_votes_are_the_plain_ones(trained):
    """On 10,000 noisy images at least 99.9 %, of a network that sees both sides of its decisions."""
    plain = load_classifier(trained).classifier.eval()
    images = torch.rand(10_000, 1, 8, 8) + 0.5 * torch.randn(10_000, 1, 8, 8)
    expected = plain(images).sum(0).argmax(-1)
    assert len(expected.unique()) > 3
    votes = freeze(plain, CPU)(images).sum(0).argmax(-1)
    assert float((votes == expected).float().mean()) >= 0.999
    bf16 = freeze(plain, CPU, "bf16")(images)
    assert bf16.dtype == torch.float32
    assert float((bf16.sum(0).argmax(-1) == expected).float().mean()) >= 0.97


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_do_not_depend_on_the_company(precision):
    """To the last bit: alone, in any place of a batch of any size."""
    frozen = freeze(warmed_up("R20", "CIFAR10", (3, 32, 32)), CPU, precision, batch_size=50)
    images = torch.rand(120, 3, 32, 32)
    together = frozen(images)
    assert torch.equal(frozen(images.roll(7, dims=0)), together.roll(7, dims=1))
    for first, last in ((0, 1), (119, 120), (3, 5), (40, 103)):
        assert torch.equal(frozen(images[first:last]), together[:, first:last])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_runs_are_the_plain_ones(script, tmp_path, trained):
    logs = []
    for flags in ((), ("--compile",)):
        folder, before = tmp_path / f"logs{len(logs)}", torch._dynamo.utils.counters["stats"]["unique_graphs"]
        certify = ("--model_path", trained, "--N", 300, "--skip", 60, "--device", "cpu", "--logs_dir", folder, *flags)
        code, _, err = script("0Gaussian/certify_mhead.py", *certify)
        assert code == 0, err
        logs.append(without_time(next(folder.rglob("*skip-60.log"))))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > before) == ("--compile" in flags)
    assert logs[0] == logs[1]


def test_a_compiler_is_needed_to_compile(script, trained):
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", trained, "--compile", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "C++ compiler" in err


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_plain_one(script, tmp_path, monkeypatch):
    """An epoch ends with the plain one's loss, to the rounding of its steps, and leaves a checkpoint as any other."""
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled.append(1) or real(*args, **kwargs))
    losses, few_sizes = [], ("--batch_size", 480, "--num_noise_vec", 1)  # each is compiled: two of steps
    for flags in ((), ("--compile", "--save_dir", "s", "--logs_dir", "l", "--runs_dir", "r")):
        code, out, err = script("0Gaussian/train.py", *TINY, "--num_heads", 1, "--epochs", 1, *few_sizes, *flags)
        assert code == 0, err
        losses.append(float(re.search(r"loss ([0-9.]+)", out)[1]))
        assert len(compiled) == ("--compile" in flags)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    keys = [set(torch.load(path, weights_only=True)["state_dict"]) for path in tmp_path.rglob("epoch1.pth")]
    assert len(keys) == 2 and keys[0] == keys[1]


def test_compiling_folds_the_weights(monkeypatch):
    """Of the graph's inputs only the images are left."""
    importlib.import_module("torch._inductor.freezing")
    kept = []
    fold = torch._inductor.freezing.freeze

    def spy(*args, **kwargs):
        module, indices = fold(*args, **kwargs)
        kept.append(len(indices))
        return module, indices

    monkeypatch.setattr("torch._inductor.freezing.freeze", spy)
    frozen = freeze(build_classifier("R8", "digits", 1).eval(), CPU, batch_size=8, compiled=True)
    with torch.inference_mode():
        frozen(torch.rand(8, 1, 8, 8))
    assert kept == [1]


class Means(torch.nn.Module):
    """Two heads that vote by the noisy image's mean and by its first pixel; notes the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        scores = torch.stack([images.flatten(1).mean(1), images.flatten(1)[:, 0]])  # [2, N]
        return torch.stack([-scores, scores], dim=-1)


def samples(ns):
    """One image for each n, each with its own generator."""
    for seed, n in enumerate(ns):
        yield Sample(torch.full((1, 2, 2), 0.1 * (seed - 3)), torch.Generator().manual_seed(seed), Draws(0, n), seed)


def test_votes_do_not_depend_on_the_company():
    ns, model = [250, 30, 100, 700, 5, 333], Means()
    smooth = Smooth(model, 2, 0.5)
    together = {one.idx: one.estimation for one in smooth.sample(samples(ns), 100)}
    assert sum(model.sizes) == sum(ns) and max(model.sizes) <= 100
    alone = [smooth.count_votes(one.x, n, 100, one.generator) for one, n in zip(samples(ns), ns, strict=True)]
    for seed, votes in enumerate(alone):
        assert votes.sum(1).tolist() == [ns[seed]] * 3
        assert (together[seed] == votes).all()


def test_batches_stay_full_where_images_stop_early():
    """A rule that stops 400 images after 100 to 3,000 draws: the batches are nearly full, the oldest goes first."""
    model, stops = Means(), torch.randint(100, 3000, (400,), generator=torch.Generator().manual_seed(1)).tolist()

    def images():
        for seed, stop in enumerate(stops):
            draws = Draws(0, 10_000, should_stop=lambda _, estimation, stop=stop: int(estimation.sum()) >= stop)
            yield Sample(torch.zeros(1, 2, 2), torch.Generator().manual_seed(seed), draws, seed)

    done = [(one.idx, int(one.estimation[-1].sum())) for one in Smooth(model, 2, 0.5).sample(images(), 1000)]
    assert sorted(key for key, _ in done) == list(range(400))
    assert all(used >= stops[key] for key, used in done)
    assert sum(model.sizes) / len(model.sizes) > 900
    assert all(abs(key - place) < 40 for place, (key, _) in enumerate(done))


def test_the_seconds_of_the_images_are_those_of_the_run(monkeypatch):
    """Also where the device is waited for only at the end: shared by copies since the last wait."""
    clock = iter(range(10_000))
    monkeypatch.setattr("spacte.smooth.smooth.time.monotonic", lambda: float(next(clock)))
    done = {one.idx: one.seconds for one in Smooth(Means(), 2, 0.5).sample(samples([250, 30, 700]), 100)}
    # images 0 and 1 are finished with the same batch: the first tick; image 2 alone takes the second
    assert done == pytest.approx({0: 250 / 280, 1: 30 / 280, 2: 1})


class PreActivation(torch.nn.Module):
    """BatchNorm acts before the convolution that is named before it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16)

    def forward(self, images):
        return self.conv1(self.bn1(images).relu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.register_forward_pre_hook(lambda module, inputs: (1 - inputs[0],)), "remove its hooks"),
        (lambda one: one.network, "a CifarResNetMultiHead cannot be frozen: give Sequential"),
        (lambda one: freeze(one, CPU), "a Frozen cannot be frozen"),
    ],
)
def test_what_would_be_left_out_of_a_frozen_classifier_is_refused(change, message):
    classifier = warmed_up("R8", "digits", (1, 8, 8))
    changed = change(classifier)
    with pytest.raises(UserError, match=message):
        freeze(changed if isinstance(changed, torch.nn.Module) else classifier, CPU)
    with pytest.raises(UserError, match="precision 'bfloat16': choose from fp32, tf32, bf16, int8"):
        freeze(classifier, CPU, "bfloat16")


@torch.inference_mode()
def test_an_autocast_around_it_does_not_change_the_fast_path():
    frozen, images = freeze(warmed_up("R8", "digits", (1, 8, 8)), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    expected = frozen(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(images), expected)


def test_a_network_that_folding_would_change_is_refused():
    classifier = warmed_up("R8", "digits", (1, 8, 8))
    freeze(classifier, "cpu")
    block = PreActivation().eval()
    torch.nn.init.uniform_(block.bn1.running_var, 2, 4)
    classifier.network.layer1.append(block)
    with pytest.raises(UserError, match="CifarResNetMultiHead cannot be frozen: in each of its modules a BatchNorm"):
        freeze(classifier, CPU)
