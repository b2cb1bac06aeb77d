"""Smooth from Python: what it refuses, and what it leaves of a caller's module."""

import numpy as np
import pytest
import torch

from spacte.model import build_classifier
from spacte.model.frozen import freeze
from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import VoteRequest
from spacte.utils import UserError


@pytest.mark.parametrize(("change", "message"), [
    ({"alpha": 1.0}, "alpha 1.0: it must be above 0 and below 1"), ({"alpha": 0}, "alpha 0"),
    ({"alpha": float("nan")}, "alpha nan"), ({"n": 0}, "n0 10 and n 0"), ({"n0": -1}, "n0 -1"),
    ({"n0": 0}, "n0 0: a certificate is of the class"), ({"generator": 3}, "a int: it must be a torch.Generator"),
    ({"n": float("nan")}, "n nan: it must be an integer"), ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 9.5}, "batch_size 9.5: it must be an integer"), ({"x": np.zeros((1, 8, 8))}, "must be a tensor"),
    ({"x": torch.zeros(1, 8, 8).byte()}, "floating point"), ({"x": torch.zeros(1, 8, 8).half()}, "float32 or float64"),
])  # fmt: skip
def test_what_cannot_be_certified_is_refused_at_once(change, message):
    call = {"x": torch.zeros(1, 8, 8), "n0": 10, "n": 100, "alpha": 0.001, "batch_size": 50} | change
    with pytest.raises(ValueError, match=message):
        Smooth(lambda images: images.flatten(1)[:, :10], 10, 0.5).certify(**call)
    with pytest.raises(ValueError, match="sigma -1"):
        Smooth(lambda images: images.flatten(1)[:, :10], 10, -1.0)
    with pytest.raises(ValueError, match="num_classes '10': it must be an integer"):
        Smooth(lambda images: images.flatten(1)[:, :10], "10", 1.0)
    with pytest.raises(ValueError, match="alpha 2: it must be above 0 and below 1"):
        Smooth(lambda images: images.flatten(1)[:, :10], 10, 0.5).predict(torch.zeros(1, 8, 8), 10, 2, 50)


@pytest.mark.parametrize("name", ["sigma", "noise", "base_classifier", "num_classes", "consensus", "voter"])
def test_what_a_smoothed_classifier_was_made_of_does_not_change(name):
    """The noise would keep the sigma that the radius no longer has."""
    smooth = Smooth(lambda images: images.flatten(1)[:, :10], 10, 0.5)
    with pytest.raises(AttributeError, match=f"a Smooth's {name} does not change: make another Smooth"):
        setattr(smooth, name, 1.0)


@pytest.mark.parametrize(
    ("behind", "classes"), [(torch.nn.Flatten(), 64), (freeze(build_classifier("R8", "digits", 1), "cpu"), 10)]
)
def test_a_module_votes_in_eval_mode_although_it_is_trained_on(behind, classes):
    """Else BatchNorm would make its answers depend on their batch, and keep what it has seen."""
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.5), behind)
    smooth, x = Smooth(module, classes, 0.5), torch.full((1, 8, 8), 0.5)
    expected = smooth.count_votes(x, 200, 50, torch.Generator().manual_seed(0))
    module.train()
    (votes,) = smooth.count_many([VoteRequest(x, torch.Generator().manual_seed(0), Draws(0, 200))], 50)
    assert (votes.estimation == expected).all()
    for part in (module, module[0]):  # between two images, too
        several = [VoteRequest(x, torch.Generator().manual_seed(0), Draws(0, 200)) for _ in range(3)]
        for votes in smooth.count_many(several, 50):
            part.train()
            assert (votes.estimation == expected).all()
    assert not module[0].num_batches_tracked


def test_a_module_that_keeps_what_it_makes_at_its_first_call_can_be_trained_on():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    Smooth(module, 10, 0.5).certify(torch.rand(1, 8, 8), 20, 100, 0.001, 100)
    module(torch.rand(4, 1, 8, 8)).sum().backward()
    assert module[1].weight.grad is not None


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda images: (images.flatten(1),), r"returned a tuple for 50 images: it must return logits \[N, K\]"),
        (lambda images: images.flatten(1)[:, None, :10], r"a tensor \[50, 1, 10\] for 50 images"),
        (lambda images: images.flatten(1)[0, :10], r"a tensor \[10\] for"),
    ],
)
def test_what_are_no_logits_is_named(returned, message):
    for consensus in (None, 1):
        with pytest.raises(UserError, match=message):
            Smooth(returned, 10, 0.5, consensus=consensus).count_votes(torch.zeros(1, 8, 8), 50, 50)
    with pytest.raises(ValueError, match="is a dict: give a callable, of load_classifier's"):
        Smooth({}, 10, 0.5)


def test_votes_need_no_gradient():
    enabled = []

    def classifier(images):
        enabled.append(torch.is_grad_enabled())
        return images.flatten(1)[:, :2]

    smooth = Smooth(classifier, 2, 0.5)
    smooth.certify(torch.zeros(1, 2, 2), 10, 50, 0.05, 20)
    assert not any(enabled) and torch.is_grad_enabled()
