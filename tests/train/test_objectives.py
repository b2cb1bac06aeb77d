"""What a training step minimises, on which images, with which recipe."""

import sys

import objectives
import pandas as pd
import pytest
import torch
from conftest import DEFENCES, TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spacte.model import build_classifier
from spacte.model.noisy import noisy_logits
from spacte.train.meter import LossMeter

CPU = torch.device("cpu")


def objective_of(defence, *flags):
    """The defence's objective on digits with the flags, and its module."""
    objective = objectives.objective_of(defence, *flags)
    return objective, sys.modules[type(objective).__module__]


@pytest.mark.parametrize("defence", DEFENCES)
def test_the_loss_is_the_sum_of_its_parts(defence):
    """In the third of ten epochs of warm-up SmoothMix's mixed loss counts 0.3 eta."""
    objective, _ = objective_of(defence, *(("--eta", 5, "--mix_step", 1) if defence == "2SmoothMix" else ()))
    classifier = build_classifier("R8", "digits", 3)
    targets = (torch.rand(8, 10).softmax(1),) if defence == "5CATRS" else ()
    loss, parts = objective(classifier, torch.rand(8, 1, 8, 8), torch.arange(8), 3, *targets)
    counted = {
        "1Consistency": {"ce": 1, "con": 1},
        "2SmoothMix": {"ce": 1, "mix": 0.3 * 5},
        "4MACER": {"cl": 1, "rl": 12},
        "5CATRS": {"low": 1, "high": 0.5},
        "7Stability": {"ce": 1, "stability": 2},
    }.get(defence, {"ce": 1})
    assert parts["cos"] > 0.01 and all(parts[name] > 0.001 for name in counted if name != "high")
    torch.testing.assert_close(loss, parts["cos"] + sum(weight * parts[name] for name, weight in counted.items()))
    torch.testing.assert_close(parts["cos"], classifier[1].cosine_loss())


class OnOneDevice(TorchDispatchMode):
    """Fails where an operation meets a tensor that is not on the meta device, which holds no values to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.binomial.default:  # it has no shape without values
            return torch.empty_like(args[1])
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", f"{function} copies"
        return out


@pytest.mark.parametrize("more", [(), ("--pace_share", 0.5, "--paced_by", "self")])
@pytest.mark.parametrize("defence", DEFENCES)
def test_a_step_copies_nothing_to_the_device_and_waits_for_none_of_its_values(defence, more):
    """Of a GPU, too: a step could be captured as a CUDA graph."""
    objective, _ = objective_of(defence, *more, *(("--ds_epoch", 1) if defence == "6ACRWeakness" else ()))
    objective.class_thresholds = torch.ones(10, device="meta")
    objective.weights = torch.ones(20)  # what ACR-weakness knows of the training images
    classifier = build_classifier("R8", "digits", 3).to("meta").train()
    classifier[1].whole_gradient = bool(more)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
    targets = (torch.rand(8, 10, device="meta"),) if defence == "5CATRS" else ()
    images, labels = torch.rand(8, 1, 8, 8, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    with OnOneDevice():
        loss, parts = objective(classifier, images, labels, 3, *targets)
        loss.backward()
        optimizer.step()
        LossMeter(3).add(parts, 8)


def test_the_noise_vectors_of_an_image_are_independent():
    objective, _ = objective_of("0Gaussian", "--num_noise_vec", 3, "--noise_sd", 0.5)
    noises = objective.draw_noises(torch.zeros(100, 1, 8, 8))
    assert noises.shape == (3, 100, 1, 8, 8)
    correlations = torch.corrcoef(noises.flatten(1)) - torch.eye(3)  # of 6400 numbers: standard error 0.0125
    assert float(correlations.abs().max()) < 6 * 0.0125
    assert float(noises.std()) == pytest.approx(0.5, abs=6 * 0.5 / (2 * 19200) ** 0.5)


def recorded(monkeypatch, module, name):
    """What the module's function `name` is called with from here on."""
    calls, function = [], getattr(module, name)

    def record(*args, **keywords):
        calls.append(args)
        return function(*args, **keywords)

    monkeypatch.setattr(module, name, record)
    return calls


@pytest.mark.parametrize(("epoch", "bound"), [(3, 0.3 * 2 * 0.7), (10, 2 * 0.7), (25, 2 * 0.7)])
def test_smoothmix_warms_the_clean_sides_bound_up(monkeypatch, epoch, bound):
    objective, module = objective_of("2SmoothMix", "--attack_alpha", 0.7, "--mix_step", 2, "--maxnorm", 3)
    calls = recorded(monkeypatch, module, "attack")
    objective(build_classifier("R8", "digits", 2), torch.rand(4, 1, 8, 8), torch.arange(4), epoch)
    *_, steps, mix_step, alpha, maxnorm_s, maxnorm = calls[0]
    assert (steps, mix_step, alpha, maxnorm) == (4, 2, 0.7, 3) and maxnorm_s == pytest.approx(bound)


@pytest.mark.parametrize(("defence", "function", "epoch", "flags", "expected"), [
    ("3SmoothAdv", "attack", 3, ("--epsilon", 0.7), (10, 0.3 * 0.7)),  # the third of ten epochs of warm-up
    ("3SmoothAdv", "attack", 10, ("--epsilon", 0.7), (10, 0.7)),
    ("4MACER", "ct_loss", 1, ("--noise_sd", 0.5), (0.5, 12, 16, 8)),
    ("4MACER", "ct_loss", 50, ("--deferred",), (0.25, 0, 16, 8)),  # the learning rate drops after 50
    ("4MACER", "ct_loss", 51, ("--deferred",), (0.25, 12, 16, 8)),
    ("5CATRS", "attack", 1, ("--epsilon", 0.7), (4, 0.7)),
    ("5CATRS", "ct_loss", 1, ("--lbd", 2), (2, False)),
    ("5CATRS", "ct_loss", 1, ("--confidence_mask",), (0.5, True)),
])  # fmt: skip
def test_a_defences_own_settings_reach_its_attack_and_its_loss(monkeypatch, defence, function, epoch, flags, expected):
    objective, module = objective_of(defence, *flags)
    calls = recorded(monkeypatch, module, function)
    targets = (torch.rand(4, 10).softmax(1),) if defence == "5CATRS" else ()
    objective(build_classifier("R8", "digits", 2), torch.rand(4, 1, 8, 8), torch.arange(4), epoch, *targets)
    assert calls[0][-len(expected) :] == pytest.approx(expected)


@pytest.mark.parametrize(("flag", "expected"), [("auto", None), ("yes", True), ("no", False)])
def test_consistency_takes_the_users_word_on_the_means_gradient(monkeypatch, flag, expected):
    objective, module = objective_of("1Consistency", "--mean_grad", flag, "--lbd", 7, "--eta", 0.25)
    calls = recorded(monkeypatch, module, "ct_loss")
    objective(build_classifier("R8", "digits", 2), torch.rand(4, 1, 8, 8), torch.arange(4), 1)
    assert calls[0][4:] == (7, 0.25, expected)


def test_without_teaching_every_weight_is_1_and_without_cosine_nothing_is_added(script, tmp_path, own_flags):
    flags = (*TINY, "--num_heads", 2, "--epochs", 2, "--no_teaching", "--no_cosine", "--train_images", 200)
    for defence in DEFENCES:
        flags_here = (*flags, *own_flags(defence), "--logs_dir", tmp_path / defence, "--save_dir", defence)
        code, _, err = script(f"{defence}/train.py", *flags_here)
        assert code == 0, err
        (log,) = (tmp_path / defence).rglob("*-no-teaching-no-cosine-images-200-train.log")
        table = pd.read_csv(log, sep="\t")
        assert (table["weight"] == 1).all() and (table["cos"] == 0).all() and (table["easy"] == 1).all()


def test_smoothmix_takes_the_users_bound_on_the_clean_side(monkeypatch):
    objective, module = objective_of("2SmoothMix", "--mix_step", 2, "--maxnorm_s", 0.25)
    calls = recorded(monkeypatch, module, "attack")
    objective(build_classifier("R8", "digits", 2), torch.rand(4, 1, 8, 8), torch.arange(4), 4)
    assert calls[0][-2:] == (pytest.approx(0.4 * 0.25), None)


def test_catrs_learns_on_the_noise_that_its_attack_returns(monkeypatch):
    objective, module = objective_of("5CATRS")
    moved = torch.randn(4, 4, 1, 8, 8)
    monkeypatch.setattr(module, "attack", lambda *given: moved)
    calls = recorded(monkeypatch, module, "ct_loss")
    classifier, images = build_classifier("R8", "digits", 2), torch.rand(4, 1, 8, 8)
    objective(classifier, images, torch.arange(4), 1, torch.rand(4, 10).softmax(1))
    torch.testing.assert_close(calls[0][1], noisy_logits(classifier, images, moved))


def test_stabilitys_clean_side_is_without_noise(monkeypatch):
    objective, module = objective_of("7Stability")
    calls = recorded(monkeypatch, module, "ct_loss")
    classifier, images = build_classifier("R8", "digits", 2), torch.rand(4, 1, 8, 8)
    objective(classifier, images, torch.arange(4), 1)
    torch.testing.assert_close(calls[0][0], classifier(images))
