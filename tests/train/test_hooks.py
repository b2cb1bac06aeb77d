"""What a defence asks of the training split: votes that choose and weight images."""

import copy
import itertools

import numpy as np
import pytest
import torch
from children import Children
from conftest import SMALL, TINY, load_module
from test_bad_input import is_one_line, written

from spacte.data.sources import open_split
from spacte.model import build_classifier
from spacte.model.checkpoint import load_classifier
from spacte.model.frozen import freeze
from spacte.smooth.poll import poll
from spacte.smooth.smooth import Smooth
from spacte.train.command import parse
from spacte.train.trainer import Trainer
from spacte.utils import RunError, derived_seed

CPU = torch.device("cpu")


def acrweakness(*flags):
    kind = load_module("6ACRWeakness", "train").ACRWeakness
    recipe, _, own = parse(
        kind, "", [str(flag) for flag in (*SMALL, "--num_heads", 3, "--precision", "fp32", *flags)], lbdlast=1.6
    )
    return kind(recipe, 10, **own)


@pytest.fixture
def network(digits_models):
    """A network of three heads, trained on digits for a few epochs."""
    return load_classifier(digits_models[0]).classifier


def test_a_poll_is_of_smooths_votes(network, split):
    """Whatever else is in the batch; the labels are the split's."""
    smooth = Smooth(freeze(network, CPU, batch_size=50), 10, 0.5)
    labels, votes = poll(smooth, split, [7, 3, 150], 30, ("test", 5), 50)
    assert labels.tolist() == [split[idx][1] for idx in (7, 3, 150)] and votes.shape == (3, 4, 10)
    for idx, row in zip((7, 3, 150), votes, strict=True):
        generator = torch.Generator().manual_seed(derived_seed("test", 5, idx))
        np.testing.assert_array_equal(row, smooth.count_votes(split[idx][0], 30, 50, generator))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_that_a_hook_makes_answers_by_its_own_weights(split, precision):
    """An average of the weights, or a frozen teacher: whatever the precision of the training."""
    seen = []

    class Copies(load_module("0Gaussian", "train").Gaussian):
        def sampling_weights(self, epoch, classifier, split):
            other = copy.deepcopy(classifier)
            for parameter in other.parameters():
                parameter.data.zero_()
            seen.append([one.eval()(split[0][0][None]).abs().sum().item() for one in (other, classifier)])

    recipe, _, own = parse(Copies, "", [*map(str, SMALL), "--epochs", "1", "--precision", precision])
    classifier = build_classifier("R8", "digits", recipe.num_heads)
    trainer = Trainer(recipe, Copies(recipe, 10, **own), classifier, CPU, split, split)
    assert len(list(trainer.epochs())) == len(seen) == 1
    assert seen[0][0] == 0 < seen[0][1]


def test_acrweakness_leaves_images_out_once_and_weights_the_others_again(network, split):
    """What stays is what the smoothed ensemble gets right often enough; weighting again does not change who stays."""
    objective = acrweakness("--epochs", 9, "--ds_epoch", 2, "--dataset_weight_epoch", 3, "--ds_threshold", 0.5)
    weights = [objective.sampling_weights(epoch, network, split) for epoch in range(1, 10)]
    assert weights[0] is None and weights[1] is None
    out = [(weight == 0).numpy() for weight in weights[2:]]
    assert 0 < out[0].sum() < 200 and all((out[0] == one).all() for one in out)
    _, parts = objective(network, torch.rand(4, 1, 8, 8), torch.arange(4), 9)
    assert torch.equal(parts["kept"], (weights[8] > 0).float().mean())
    changed = [not torch.equal(*pair) for pair in itertools.pairwise(weights[2:])]
    assert changed == [False, False, True, False, False, True]

    smooth = Smooth(freeze(network, CPU, batch_size=100), 10, 0.5)
    share = np.array([smooth.count_votes(split[idx][0], 100, 100)[-1, split[idx][1]] / 100 for idx in range(200)])
    assert share[out[0]].mean() < 0.5 < share[~out[0]].mean() and np.corrcoef(share, ~out[0])[0, 1] > 0.7
    again = acrweakness("--epochs", 9, "--ds_epoch", 2, "--dataset_weight_epoch", 3, "--ds_threshold", 0.5)
    assert torch.equal(again.sampling_weights(3, network, split), weights[2])
    again.restore(objective.state())  # of the last epoch; epoch 7 weights nothing itself
    assert torch.equal(again.sampling_weights(7, network, split), weights[8])


def test_acrweakness_leaves_out_and_weights_by_other_draws(network, split):
    objective, smooth = acrweakness("--epochs", 9, "--ds_epoch", 2), Smooth(freeze(network, CPU), 10, 0.5)
    one, other = (objective._right_votes(why, smooth, split, range(50), 16, 3) for why in ("left out", "weighed"))
    assert (one != other).any()


def test_acrweakness_moves_noise_only_after_images_are_left_out(network, monkeypatch):
    objective = acrweakness("--epochs", 9, "--ds_epoch", 2)
    calls = []
    monkeypatch.setitem(objective.__call__.__globals__, "attack", lambda *args: calls.append(args[-2:]) or args[3])
    for epoch in (1, 2, 3):
        objective(network, torch.rand(4, 1, 8, 8), torch.arange(4), epoch)
    assert calls == [(3, 0.25)]


def test_where_no_image_is_right_often_enough_the_run_stops(split):
    objective = acrweakness("--epochs", 9, "--ds_epoch", 0, "--ds_threshold", 1.0)
    with pytest.raises(RunError, match=r"after 0 epochs no training image has a share 1.0 of right votes"):
        objective.sampling_weights(1, build_classifier("R8", "digits", 1), split)


def test_two_processes_weight_images_as_one_does(tmp_path):
    """The weights that the main process saved are those that one process gets from the same network."""
    flags = ("6ACRWeakness/train.py", *SMALL, "--num_heads", 2, "--epochs", 2, "--save_freq", 1, "--lr_init", 0.02)
    flags += ("--ds_epoch", 1, "--ds_threshold", 0.05, "--attack_steps", 1)
    with Children(tmp_path, *flags, world=2) as children:
        assert children.exit_codes() == [0, 0]
    first, second = (next((tmp_path / "save").rglob(f"epoch{epoch}.pth")) for epoch in (1, 2))
    saved = torch.load(second, weights_only=True)["objective"]["weights"]
    digits = open_split("digits", "", True, CPU)
    digits.keep_first_of_each_class(200)
    objective = acrweakness("--num_heads", 2, "--epochs", 2, "--ds_epoch", 1, "--ds_threshold", 0.05)
    assert torch.equal(objective.sampling_weights(2, load_classifier(first).classifier, digits), saved)
    assert 0 < int((saved > 0).sum()) <= 200


# --- what is refused at once ---


@pytest.mark.parametrize(
    ("defence", "flags", "message"),
    [
        ("3SmoothAdv", ("--epsilon", 256), "--epsilon: '256' must be above 0 and below 64, in units of [0, 1]"),
        ("3SmoothAdv", ("--num_steps", 0), "--num_steps: '0' must be"),
        ("4MACER", ("--margin", 0), "--margin: '0' must be"),
        ("4MACER", ("--batch_size", 1), "--batch_size 1 of 200 training images: both must be at least 2"),
        ("5CATRS", ("--num_votes", 99), "--num_votes 99: soft votes need at least 100"),
        ("5CATRS", ("--batch_size", 3), "--batch_size 3 of"),
        ("6ACRWeakness", ("--epochs", 40), "--ds_epoch 60 must lie in 0..39, below --epochs"),
        (
            "6ACRWeakness",
            ("--num_noise_dataset_weight", 13),
            "13 is too few to weight images: choose 12 or at least 14",
        ),
        ("6ACRWeakness", ("--ds_threshold", 1.5), "--ds_threshold: '1.5' must be a number from 0 to 1"),
        ("7Stability", ("--lbd", -1), "--lbd: '-1' must be"),
    ],
)
def test_a_wrong_flag_is_one_line(script, tmp_path, defence, flags, message):
    code, _, err = script(f"{defence}/train.py", *TINY, "--train_images", 200, "--num_noise_vec", 4, *flags)
    is_one_line(code, err, message)
    assert not written(tmp_path)


def test_acrweakness_asks_the_smoothed_ensemble_by_draws_of_the_seed_and_the_epoch(network, split):
    objective, smooth = acrweakness("--epochs", 9, "--ds_epoch", 2, "--seed", 5), Smooth(freeze(network, CPU), 10, 0.5)
    found = objective._right_votes("weighed", smooth, split, range(100), 16, 3)
    labels, votes = poll(smooth, split, range(100), 16, ("weighed", 5, 3))
    assert np.array_equal(found, votes[np.arange(100), -1, labels])
    assert (found != votes[np.arange(100), 0, labels]).any()


def test_acrweakness_asks_under_the_noise_of_the_training(network, split, monkeypatch):
    objective, asked = acrweakness("--epochs", 9, "--ds_epoch", 0, "--noise_sd", 0.3), []
    names = objective.sampling_weights.__globals__
    ask = names["poll"]
    monkeypatch.setitem(names, "poll", lambda smooth, *more: asked.append(smooth.sigma) or ask(smooth, *more))
    objective.sampling_weights(1, network, split)
    assert asked == [0.3, 0.3]
