"""Training options that the paper has not: what they change, and that each defence obeys them."""

import math

import pandas as pd
import pytest
import torch
from conftest import DEFENCES, TINY, load_module, same
from objectives import call, objective_of, trainer_of

from spacte.data.sources import open_split
from spacte.model import build_classifier
from spacte.train import trainer as trainer_module
from spacte.train.command import parse
from spacte.train.settings import Recipe
from spacte.train.teaching import Pace
from spacte.train.trainer import Trainer
from spacte.utils import UserError

CPU = torch.device("cpu")


def gradients(classifier, loss):
    classifier.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in classifier.named_parameters()}


# --- --paced_by ---


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_is_paced_by_whom_the_flag_says(defence):
    """A head alone learns what its own loss says, with every in-ring term; the paper's ring weights one head by 1."""
    torch.manual_seed(1)
    classifier = build_classifier("R8", "digits", 1)
    flags = ("--num_heads", 1, "--lbdlast", 0.1)
    weights = {by: call(objective_of(defence, *flags, "--paced_by", by), classifier)[1]["weight"]
               for by in ("neighbour", "self", "none")}  # fmt: skip
    assert weights["neighbour"] == weights["none"] == 1 > weights["self"]


def test_no_teaching_is_the_other_name_of_nobody():
    recipes = [parse(load_module("0Gaussian", "train").Gaussian, "", flags)[0]
               for flags in (["--no_teaching"], ["--paced_by", "none"])]  # fmt: skip
    assert recipes[0] == recipes[1] and recipes[0].variant == "-no-teaching"


def test_a_defences_own_lambda_goes_with_a_pace_share():
    """The samples of a `pace` that it returns are weighted on plain noise, too."""
    kind = load_module("0Gaussian", "train").Gaussian
    own = type("Own", (kind,), {"pace": lambda self, epoch: Pace(0.7, self.recipe.paced_by)})
    recipe, _, _ = parse(kind, "", ["--pace_share", "0.8", "--paced_by", "self"])
    pace = own(recipe, 10).pace_from_logits(1, torch.zeros(1, 2, 3, 10), torch.arange(3))
    assert pace.threshold == 0.7 and pace.by == "self" and pace.losses.shape == (1, 3)


# --- --whole_gradient ---


@pytest.mark.parametrize("defence", DEFENCES)
def test_the_whole_gradient_is_the_trunks_own_and_l_times_a_heads(defence):
    """To the bit with 4 heads, by which floats divide exactly; the cosine constraint, no mean over heads, is off."""
    torch.manual_seed(2)
    classifier = build_classifier("R8", "digits", 4)
    objective = objective_of(defence, "--num_heads", 4, "--no_cosine")
    plain, _ = call(objective, classifier)
    before = gradients(classifier, plain)
    classifier[1].whole_gradient = True
    whole, _ = call(objective, classifier)
    after = gradients(classifier, whole)
    assert torch.equal(whole, plain)
    assert all(torch.equal(after[name], (4 if "heads" in name else 1) * before[name]) for name in before)
    assert any("heads" in name for name in before) and any("heads" not in name for name in before)


def test_the_whole_gradient_leaves_the_cosine_constraint_alone():
    classifier = build_classifier("R8", "digits", 3)
    before = gradients(classifier, classifier[1].cosine_loss())
    classifier[1].whole_gradient = True
    after = gradients(classifier, classifier[1].cosine_loss())
    assert all((after[name] is None) == (before[name] is None) for name in after)
    assert all(torch.equal(after[name], before[name]) for name in after if after[name] is not None)


# --- --pace_share ---


def test_the_share_falls_in_a_straight_line_to_that_of_the_flag():
    objective = objective_of("0Gaussian", "--pace_share", 0.6, "--epochs", 5)
    assert [objective.easy_share(epoch) for epoch in range(1, 6)] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])
    assert objective_of("0Gaussian").easy_share(150) == 1


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_lambda_for_each_class_reaches_every_defence(defence):
    """Of lambdas of 0 for some classes and infinity for others, the latter's samples alone are easy."""
    objective = objective_of(defence, "--num_heads", 2, "--pace_share", 0.5)
    assert objective.pace(1) == Pace(math.inf, "neighbour"), "nothing is measured yet"
    objective.class_thresholds = torch.tensor([0.0] * 4 + [math.inf] * 6)
    _, parts = call(objective, build_classifier("R8", "digits", 2))
    assert float(parts["easy"]) == 0.5 and 0 < float(parts["weight"]) < 1


def test_the_share_is_met_by_the_losses_of_a_step(script, tmp_path):
    """Trained on digits: the steps' easy share follows q(t), and that of a share of 1 is the plain run's to the bit."""
    flags, tables = (*TINY, "--num_heads", 2, "--lr_init", 0.01), {}
    runs = {"plain": ["--no_teaching", "--epochs", 2], "all": ["--pace_share", 1, "--epochs", 2]}
    for label, more in (runs | {"half": ["--pace_share", 0.5, "--epochs", 6]}).items():
        here = ("--logs_dir", tmp_path / label, "--save_dir", tmp_path / f"save-{label}")
        code, _, err = script("0Gaussian/train.py", *flags, *more, *here)
        assert code == 0, err
        (log,) = (tmp_path / label).rglob("*-train.log")
        tables[label] = pd.read_csv(log, sep="\t").drop(columns="images_per_second")
    assert "lambda" not in tables["plain"], "nothing is weighted by one"
    pd.testing.assert_frame_equal(tables["all"].drop(columns="lambda"), tables["plain"])
    half = tables["half"]
    assert half["easy"].tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5], abs=0.15)
    assert half["lambda"][0] == math.inf and half["lambda"][1:].between(0, 10).all()


@pytest.mark.parametrize("defence", ["2SmoothMix", "6ACRWeakness", "7Stability"])
def test_the_share_is_met_where_the_loss_is_not_on_plain_noise(script, tmp_path, own_flags, defence):
    """But on attacked or on clean images: .5 of the last of 4 epochs, and as much more as the epoch itself lowers the
    losses. Measured on the attacked ones it would be .2, on the clean ones .9.
    """
    flags = (*TINY, *own_flags(defence), "--num_heads", 2, "--epochs", 4, "--lr_init", 0.01, "--pace_share", 0.5)
    flags += ("--paced_by", "self", "--train_images", 600)
    flags += ("--mix_step", 1, "--warmup", 1) if defence == "2SmoothMix" else ()
    code, _, err = script(f"{defence}/train.py", *flags, "--logs_dir", tmp_path / "logs", "--save_dir", defence)
    assert code == 0, err
    (log,) = (tmp_path / "logs").rglob("*-train.log")
    assert 0.4 < pd.read_csv(log, sep="\t")["easy"].iloc[-1] < 0.7


def test_the_pace_is_measured_where_a_mini_batch_is_smaller_than_their_number(script):
    """m steps share a batch of fewer than m * m images."""
    flags = (*TINY, "--num_heads", 2, "--num_noise_vec", 8, "--batch_size", 32, "--train_images", 64 // 4 * 10)
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--pace_share", 0.5)
    assert code == 0, err


def test_measuring_the_pace_moves_no_draw_and_no_statistic(tmp_path):
    objective = objective_of("0Gaussian", "--dataset", "digits", "--arch", "R8", "--num_heads", 2, "--pace_share", 0.5)

    split = open_split("digits", str(tmp_path), True, CPU)
    classifier = build_classifier("R8", "digits", 2)
    trainer = Trainer(objective.recipe, objective, classifier, CPU, split, split)
    classifier.train()
    before, draws = {name: value.clone() for name, value in classifier.state_dict().items()}, torch.get_rng_state()
    found = trainer._class_thresholds(4, 0.8, None)
    assert found.shape == (10,) and bool(found.isfinite().all())
    assert torch.equal(found, trainer._class_thresholds(4, 0.8, None))
    assert not torch.equal(found, trainer._class_thresholds(5, 0.8, None))
    first = (split.labels < 5).double()
    some = trainer._class_thresholds(4, 0.8, first)
    assert bool(some[:5].isfinite().all()) and bool(some[5:].isinf().all()), "what is left out is not measured"
    attacked = objective_of("3SmoothAdv", "--num_heads", 2, "--pace_share", 0.5)
    images, labels = split.evenly_spaced(8)
    attacked.pace_from_noise(4, classifier, images, torch.as_tensor(labels), torch.zeros(2, *images.shape))
    assert torch.equal(draws, torch.get_rng_state()) and classifier.training
    after = classifier.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {module.momentum for module in classifier.modules() if hasattr(module, "momentum")} == {0.1}


def test_a_run_with_a_lambda_for_each_class_is_resumed_to_the_bit(script, tmp_path):
    flags = (
        *TINY,
        "--num_heads",
        2,
        "--pace_share",
        0.5,
        "--save_freq",
        1,
        "--resume",
        "--save_dir",
        tmp_path / "save",
    )
    assert script("0Gaussian/train.py", *flags, "--epochs", 4)[0] == 0
    (last,) = tmp_path.rglob("epoch4.pth")
    whole = torch.load(last, weights_only=True)["state_dict"]
    for epoch in (3, 4):
        last.with_name(f"epoch{epoch}.pth").unlink()
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 4)
    assert code == 0, err
    again = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("flags", [("--paced_by", "none"), ("--num_heads", 1), ("--no_teaching",)])
def test_a_share_that_nobody_paces_by_is_refused(flags):
    with pytest.raises(UserError, match="give --paced_by self"):
        objective_of("0Gaussian", "--pace_share", 0.5, *flags)


def test_settings_without_effect_are_refused():
    for settings, message in (
        ({"pace_share": 0.5, "epochs": 1}, "from the second epoch on"),
        ({"whole_gradient": True, "num_heads": 1}, "one head has its whole gradient"),
        ({"whole_gradient": True, "num_heads": 2}, "2 heads that all weigh 1/2: give --eps 0.5"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe(**settings)


def test_two_words_on_who_paces_contradict_each_other(script):
    code, _, err = script("0Gaussian/train.py", *TINY, "--no_teaching", "--paced_by", "self")
    assert code == 2 and "not allowed with argument" in err


def test_the_flag_of_the_whole_gradient_reaches_the_network(script, tmp_path):
    states = []
    for more in ((), ("--whole_gradient",)):
        flags = (*TINY, "--num_heads", 2, "--eps", 0.5, "--epochs", 1, "--train_images", 200, *more)
        code, _, err = script("0Gaussian/train.py", *flags, "--save_dir", f"save{len(states)}")
        assert code == 0, err
        (path,) = (tmp_path / f"save{len(states)}").rglob("epoch1.pth")
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert not same(*states)


@pytest.mark.parametrize(("classes", "images"), [(10, 1437), (5, 1024)])
def test_the_pace_is_measured_on_200_images_of_each_class(monkeypatch, classes, images):
    """In whole batches of 256; where there are fewer, on all."""
    measured = []

    def quantiles(losses, labels, *more):
        measured.append(len(labels))
        return torch.zeros(classes)

    monkeypatch.setattr(trainer_module, "class_quantiles", quantiles)
    trainer = trainer_of("0Gaussian", 1437, "--num_heads", 2, "--pace_share", 0.5)
    trainer.objective.num_classes = classes
    trainer._class_thresholds(2, 0.9, None)
    assert measured == [images]


def test_the_pace_is_measured_by_draws_of_its_own():
    """Whatever was drawn before."""
    trainer, found = trainer_of("0Gaussian", 200, "--num_heads", 2, "--pace_share", 0.5), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(trainer._class_thresholds(4, 0.8, None))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("defence", "flags"), [("2SmoothMix", ("--mix_step", 1)), ("3SmoothAdv", ()), ("6ACRWeakness", ())]
)
def test_the_pace_is_measured_on_the_images_themselves(monkeypatch, defence, flags):
    objective, asked = objective_of(defence, *flags), []
    pace = objective.pace_from_noise
    objective.pace_from_noise = lambda *given: asked.append(given[2:]) or pace(*given)
    drawn, draw = [], objective.draw_noises
    objective.draw_noises = lambda images: drawn.append(draw(images)) or drawn[0]
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    objective(build_classifier("R8", "digits", 2), images, labels, 150)
    assert all(one is other for one, other in zip(asked[0], (images, labels, drawn[0]), strict=True))
