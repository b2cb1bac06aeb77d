"""The fast path computes the plain network's function, whatever shares its batches."""

import copy
import importlib
import re
import shutil

import pytest
import torch
from conftest import TINY, without_time

from spacte.model import build_classifier
from spacte.model.checkpoint import load_classifier
from spacte.model.ensemble import named_classes, with_ensemble
from spacte.model.frozen import freeze
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
        (lambda one: one.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)), "remove its hooks"),
        (lambda one: one.network, "a CifarResNetMultiHead cannot be frozen: give Sequential"),
        (lambda one: freeze(one, CPU), "a FrozenClassifier cannot be frozen"),
    ],
)
def test_what_would_be_left_out_of_a_frozen_classifier_is_refused(change, message):
    classifier = warmed_up("R8", "digits", (1, 8, 8))
    changed = change(classifier)
    with pytest.raises(UserError, match=message):
        freeze(changed if isinstance(changed, torch.nn.Module) else classifier, CPU)
    with pytest.raises(UserError, match="precision 'bfloat16': choose from fp32, tf32, bf16, int8"):
        freeze(classifier, CPU, "bfloat16")


def test_an_autocast_around_it_does_not_change_the_fast_path():
    frozen, images = freeze(warmed_up("R8", "digits", (1, 8, 8)), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    with torch.no_grad():
        expected = frozen(images)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(frozen(images), expected)
        torch.testing.assert_close(frozen(images), expected)  # in one pass, as an attack's gradients need it


def test_a_network_that_folding_would_change_is_refused():
    classifier = warmed_up("R8", "digits", (1, 8, 8))
    freeze(classifier, "cpu")
    block = PreActivation().eval()
    torch.nn.init.uniform_(block.bn1.running_var, 2, 4)
    classifier.network.layer1.append(block)
    with pytest.raises(UserError, match="CifarResNetMultiHead cannot be frozen: in each of its modules a BatchNorm"):
        freeze(classifier, CPU)


@torch.inference_mode()
def test_bf16_begins_behind_the_normalisation():
    """In which it would round what the noise adds to a pixel."""
    classifier, seen = warmed_up("R8", "digits", (1, 8, 8)), []
    images = torch.rand(4, 1, 8, 8)
    frozen = freeze(classifier, CPU, "bf16", batch_size=4)
    frozen.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frozen(images)
    assert torch.equal(seen[0], classifier[0](images).bfloat16())


def test_the_network_that_is_frozen_stays_as_it_was():
    classifier = warmed_up("R8", "digits", (1, 8, 8)).train()
    state = copy.deepcopy(classifier.state_dict())
    frozen = freeze(classifier, CPU, "bf16")
    assert not any(one.requires_grad for one in frozen.parameters()) and not frozen.network.training
    after = classifier.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[key], after[key]) for key in state)
    assert classifier.training and all(one.requires_grad for one in classifier.parameters())


def test_a_network_whose_training_has_diverged_is_named():
    classifier = warmed_up("R8", "digits", (1, 8, 8))
    classifier.network.conv1.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="logits are not finite on noise: has its training diverged"):
        freeze(classifier, CPU)
