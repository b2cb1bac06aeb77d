"""Training options that the paper has not: what they change, and that each defence obeys them."""

import dataclasses
import math

import pandas as pd
import pytest
import torch
from conftest import DEFENCES, TINY, load_module

from spacte.data.spec import data_spec
from spacte.model import build_classifier, checkpoint
from spacte.train.pretrained import Teachers
from spacte.train.settings import Recipe
from spacte.train.teaching import Pace
from spacte.train.trainer import Trainer
from spacte.train.training import parse
from spacte.utils import UserError

CPU = torch.device("cpu")


def objective_of(defence, *flags):
    """The defence's objective on digits with the flags."""
    kind = getattr(load_module(defence, "train"), defence[1:])
    recipe, _, own = parse(kind, "", 1.0, [str(flag) for flag in flags])
    return kind(recipe, 10, **own)


def call(objective, classifier):
    """(loss, parts) of the last epoch on eight random images, the same ones and the same draws each time."""
    torch.manual_seed(0)
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()  # attacks look at them
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    targets = (torch.rand(8, 10).softmax(1),) if objective.name() == "CATRS" else ()
    return objective(classifier, images, labels, 150, *targets)


def gradients(classifier, loss):
    classifier.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in classifier.named_parameters()}


# --- --paced_by ---


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_is_paced_by_whom_the_flag_says(defence):
    """A head alone learns what its own loss says, with every in-ring term; the paper's ring weighs one head by 1."""
    torch.manual_seed(1)
    classifier = build_classifier("R8", "digits", 1)
    flags = ("--num_heads", 1, "--lbdlast", 0.1)
    weights = {by: call(objective_of(defence, *flags, "--paced_by", by), classifier)[1]["weight"]
               for by in ("neighbour", "self", "none")}  # fmt: skip
    assert weights["neighbour"] == weights["none"] == 1 > weights["self"]


def test_no_teaching_is_the_other_name_of_nobody():
    recipes = [parse(load_module("0Gaussian", "train").Gaussian, "", 1.0, flags)[0]
               for flags in (["--no_teaching"], ["--paced_by", "none"])]  # fmt: skip
    assert recipes[0] == recipes[1] and recipes[0].variant == "-no-teaching"


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
    assert objective.threshold(1) == Pace(math.inf, "neighbour"), "nothing is measured yet"
    objective.class_thresholds = torch.tensor([0.0] * 4 + [math.inf] * 6)
    _, parts = call(objective, build_classifier("R8", "digits", 2))
    assert float(parts["easy"]) == 0.5 and 0 < float(parts["weight"]) < 1


def test_the_share_is_met_by_the_losses_of_a_step(script, tmp_path):
    """Trained on digits: the steps' easy share follows q(t), and that of a share of 1 is the plain run's to the bit."""
    flags = (*TINY, "--num_heads", 2, "--epochs", 6, "--lr_init", 0.01)
    tables = {}
    for label, more in (("plain", ["--no_teaching"]), ("all", ["--pace_share", 1]), ("half", ["--pace_share", 0.5])):
        here = ("--logs_dir", tmp_path / label, "--save_dir", tmp_path / f"save-{label}")
        code, _, err = script("0Gaussian/train.py", *flags, *more, *here)
        assert code == 0, err
        (log,) = (tmp_path / label).rglob("*-train.log")
        tables[label] = pd.read_csv(log, sep="\t").drop(columns="images_per_second")
    pd.testing.assert_frame_equal(tables["all"], tables["plain"])
    half = tables["half"]
    assert half["easy"].tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5], abs=0.15)
    assert half["lambda"][0] == math.inf and half["lambda"][1:].between(0, 10).all()


@pytest.mark.parametrize("defence", ["2SmoothMix", "3SmoothAdv", "6ACRWeakness", "7Stability"])
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
    from spacte.data.sources import open_split

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
    assert torch.equal(draws, torch.get_rng_state()) and classifier.training
    after = classifier.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "num_batches" not in name)
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


# --- --teachers ---


def saved(tmp_path, heads, seed=0, **changes):
    """A checkpoint of a fresh R8 on digits."""
    torch.manual_seed(seed)
    recipe = dataclasses.replace(Recipe(dataset="digits", arch="R8", num_heads=heads), **changes)
    classifier = build_classifier("R8", "digits", heads)
    path = tmp_path / f"{heads}-{seed}.pth"
    args = dataclasses.asdict(recipe)
    checkpoint.save(path, {"state_dict": classifier.state_dict(), "data": data_spec("digits"), "args": args})
    return str(path)


def test_a_head_that_predicts_what_its_teacher_does_has_no_loss_and_no_other_head_has_none(tmp_path):
    paths = [saved(tmp_path, 1, seed) for seed in (1, 2)]
    recipe = Recipe(dataset="digits", arch="R8", num_heads=2, teachers=tuple(paths))
    teachers = Teachers(recipe, data_spec("digits"), CPU)
    images, noises = torch.rand(6, 1, 8, 8), torch.randn(3, 6, 1, 8, 8) * 0.5
    copies = (images + noises).flatten(0, 1)
    with torch.no_grad():
        first, second = (checkpoint.load_classifier(path).classifier(copies)[0].unflatten(0, (3, 6)) for path in paths)
    own = teachers.divergences(torch.stack([first, second]), images, noises)
    torch.testing.assert_close(own, torch.zeros(2, 6), atol=1e-6, rtol=0)
    swapped = teachers.divergences(torch.stack([second, first]), images, noises)
    expected = (first.softmax(-1) * (first.log_softmax(-1) - second.log_softmax(-1))).sum(-1).mean(0)
    torch.testing.assert_close(swapped[0], expected, rtol=1e-4, atol=1e-6)
    assert float(swapped.min()) > 0


def test_one_head_learns_the_mean_of_its_teachers(tmp_path):
    paths = [saved(tmp_path, 1, seed) for seed in (1, 2)] + [saved(tmp_path, 3)]
    recipe = Recipe(dataset="digits", arch="R8", num_heads=1, teachers=tuple(paths))
    images = torch.rand(5, 1, 8, 8)
    found = Teachers(recipe, data_spec("digits"), CPU).predictions(images)
    each = [checkpoint.load_classifier(path).classifier(images).softmax(-1).mean(0) for path in paths]
    torch.testing.assert_close(found, torch.stack(each).mean(0, keepdim=True))


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_learns_from_teachers(tmp_path, defence):
    paths = [saved(tmp_path, 1, seed) for seed in (1, 2)]
    objective = objective_of(
        defence, "--dataset", "digits", "--arch", "R8", "--num_heads", 2, "--teachers", *paths, "--no_cosine"
    )
    torch.manual_seed(3)
    classifier = build_classifier("R8", "digits", 2)
    without, parts = call(objective, classifier)
    assert "distil" not in parts
    objective.teachers = Teachers(objective.recipe, data_spec("digits"), CPU)
    taught, parts = call(objective, classifier)
    assert parts["distil"].item() > 0.001
    torch.testing.assert_close(taught, without + parts["distil"])


def test_settings_without_effect_are_refused():
    for settings, message in (
        ({"pace_share": 0.5, "epochs": 1}, "from the second epoch on"),
        ({"whole_gradient": True, "num_heads": 1}, "one head has its whole gradient"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe(**settings)


def test_two_words_on_who_paces_contradict_each_other(script):
    code, _, err = script("0Gaussian/train.py", *TINY, "--no_teaching", "--paced_by", "self")
    assert code == 2 and "not allowed with argument" in err


def test_teachers_of_other_classes_are_refused(tmp_path):
    path = saved(tmp_path, 1)
    spec = dataclasses.replace(data_spec("digits"), class_names=tuple("abcdefghij"))
    with pytest.raises(UserError, match="other images or classes"):
        Teachers(Recipe(dataset="digits", num_heads=1, teachers=(path,)), spec, CPU)


def test_teachers_must_fit(tmp_path):
    paths = [saved(tmp_path, 1, seed) for seed in (1, 2)]
    with pytest.raises(UserError, match="names 2 checkpoints for 3 heads"):
        Recipe(num_heads=3, teachers=paths)
    with pytest.raises(UserError, match="contradicts checkpoint"):
        Teachers(Recipe(num_heads=2, teachers=paths), data_spec("CIFAR10"), CPU)


def test_a_run_with_teachers_resumes_with_the_same_ones_wherever_they_lie(script, tmp_path):
    paths = [saved(tmp_path, 1, seed) for seed in (1, 2)]
    flags = (*TINY, "--num_heads", 2, "--resume", "--save_dir", tmp_path / "save")
    assert script("0Gaussian/train.py", *flags, "--epochs", 2, "--teachers", *paths)[0] == 0
    (last,) = tmp_path.rglob("*-teachers-2/epoch2.pth")
    whole = torch.load(last, weights_only=True)["state_dict"]
    last.unlink()
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--teachers", *reversed(paths))
    assert code == 2 and "began with other networks" in err and "--teachers" in err
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--teachers", paths[0], "gone.pth")
    assert code == 2 and "--teachers: there is no checkpoint 'gone.pth'" in err
    moved = [str(tmp_path / f"moved-{number}.pth") for number in (1, 2)]
    for path, to in zip(paths, moved, strict=True):
        (tmp_path / path).rename(to)
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--teachers", *moved)
    assert code == 0, err
    again = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    code, out, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--teachers", "gone.pth", "gone.pth")
    assert code == 0 and "nothing is left to do" in out, err
    released = tmp_path / "released.pth"
    assert script("release.py", last, "--output", released)[0] == 0
    contents = torch.load(released, weights_only=True)
    assert contents["args"]["teachers"] == ("moved-1.pth", "moved-2.pth"), "no folders"
    assert checkpoint.load_classifier(released).training["inputs"] == contents["inputs"]
    assert len(contents["inputs"]["teachers"]) == 2


def test_a_defence_that_would_ignore_its_teachers_is_refused(tmp_path):
    from spacte.data.sources import open_split
    from spacte.train.objective import Objective

    class Own(Objective):
        def __call__(self, classifier, images, labels, epoch):
            loss = classifier(images).square().mean()
            return loss, {"ce": loss}

    recipe = Recipe(dataset="digits", arch="R8", num_heads=1, teachers=(saved(tmp_path, 1),))
    objective, split = Own(recipe, 10), open_split("digits", str(tmp_path), True, CPU)
    objective.teachers = Teachers(recipe, split.spec, CPU)
    trainer = Trainer(recipe, objective, build_classifier("R8", "digits", 1), CPU, split, split)
    with pytest.raises(UserError, match="Own does not call `other_losses`"):
        trainer.step(torch.rand(4, 1, 8, 8), torch.arange(4), 1)


# --- --frozen_trunk ---


def test_a_frozen_trunk_stays_to_the_bit_and_the_heads_learn(script, tmp_path):
    base = saved(tmp_path, 1, seed=4)
    flags = (*TINY, "--num_heads", 2, "--frozen_trunk", base, "--save_dir", tmp_path / "save", "--epochs", 2)
    code, _, err = script("0Gaussian/train.py", *flags)
    assert code == 0, err
    (last,) = tmp_path.rglob("*-frozen-trunk/epoch2.pth")
    there, here = (checkpoint.read(path)["state_dict"] for path in (base, last))
    trunk = [name for name in there if not name.startswith("1.heads")]
    assert len(trunk) > 10 and all(torch.equal(here[name], there[name]) for name in trunk)
    torch.manual_seed(666)
    fresh = build_classifier("R8", "digits", 2).state_dict()
    heads = [name for name in here if name.startswith("1.heads")]
    assert all(not torch.equal(here[name], fresh[name]) for name in heads)


def test_a_trunk_of_another_network_is_refused(script, tmp_path):
    base = saved(tmp_path, 1)
    code, _, err = script("0Gaussian/train.py", *TINY, "--arch", "R14", "--frozen_trunk", base)
    assert code == 2 and "is of R8, the network here of R14" in err
    torch.save(checkpoint.read(base)["state_dict"], tmp_path / "weights.pth")
    code, _, err = script("0Gaussian/train.py", *TINY, "--frozen_trunk", tmp_path / "weights.pth")
    assert code == 2 and "does not say its architecture" in err
