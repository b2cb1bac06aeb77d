"""What a training takes from trained networks: teachers, and a frozen trunk."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import DEFENCES, TINY
from objectives import call, objective_of

from spacte.data.spec import data_spec
from spacte.model import build_classifier, checkpoint, checkpoint_file
from spacte.model.noisy import noisy_logits
from spacte.train.pretrained import Teachers, take_trunk
from spacte.train.settings import Recipe
from spacte.train.teaching import taught_cross_entropy
from spacte.train.trainer import Trainer
from spacte.utils import UserError

CPU = torch.device("cpu")


# --- --teachers ---


def saved(tmp_path, heads, seed=0, **changes):
    """A checkpoint of a fresh R8 on digits."""
    torch.manual_seed(seed)
    recipe = dataclasses.replace(Recipe(dataset="digits", arch="R8", num_heads=heads), **changes)
    classifier = build_classifier("R8", "digits", heads)
    path = tmp_path / f"{heads}-{seed}.pth"
    args = dataclasses.asdict(recipe)
    checkpoint_file.save(path, {"state_dict": classifier.state_dict(), "data": data_spec("digits"), "args": args})
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


@pytest.mark.parametrize("defence", DEFENCES)
def test_teachers_see_what_the_heads_have_seen(defence):
    """Attacked images with their noise, where the heads learn on these."""
    flags = ("--mix_step", 1) if defence == "2SmoothMix" else ()  # else its clean side is not attacked
    objective = objective_of(defence, "--num_heads", 2, "--no_cosine", *flags)
    classifier, seen = build_classifier("R8", "digits", 2), []

    def divergences(logits, images, noises):
        seen.append((logits, noisy_logits(classifier, images, noises)))
        return logits.mean((1, 3))

    objective.teachers = SimpleNamespace(divergences=divergences)
    call(objective, classifier)
    torch.testing.assert_close(*seen[0])


def test_a_teacher_helps_with_hard_samples_as_with_easy_ones(tmp_path):
    """Whatever the neighbour's weights: the mean over samples, each head by its own weight."""
    paths = [saved(tmp_path, 1, seed) for seed in (1, 2)]
    objective = objective_of("0Gaussian", "--dataset", "digits", "--num_heads", 2, "--teachers", *paths, "--no_cosine")
    objective.teachers = Teachers(objective.recipe, data_spec("digits"), CPU)
    logits, images, noises = torch.randn(2, 3, 4, 10), torch.rand(4, 1, 8, 8), torch.randn(3, 4, 1, 8, 8)
    loss = taught_cross_entropy(logits, torch.arange(4), 1.0, 0.7, 0.0)
    loss = dataclasses.replace(loss, sample_weights=torch.zeros(2, 4))
    found = objective.total_loss(build_classifier("R8", "digits", 2), loss, logits, images, noises)[1]["distil"]
    expected = objective.teachers.divergences(logits, images, noises).mean(1) @ loss.head_weights / 2
    torch.testing.assert_close(found, expected)


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
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--teachers", *reversed(moved))
    assert code == 2 and "began with other networks" in err, "a finished run's, too"
    code, out, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--teachers", "gone.pth", "gone.pth")
    assert code == 0 and "nothing is left to do" in out, err
    released = tmp_path / "released.pth"
    assert script("release.py", last, "--output", released)[0] == 0
    contents = torch.load(released, weights_only=True)
    assert contents["args"]["teachers"] == ("moved-1.pth", "moved-2.pth"), "no folders"
    training = checkpoint.load_classifier(released).training
    assert training["inputs"] == contents["inputs"] and "places" not in training
    assert "data_dir" in checkpoint.load_classifier(last).training["places"]
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
    with pytest.raises(UserError, match="Own does not call `total_loss`"):
        trainer.step(torch.rand(4, 1, 8, 8), torch.arange(4), 1)


# --- --frozen_trunk ---


def test_a_frozen_trunk_stays_to_the_bit_and_the_heads_learn(script, tmp_path):
    base = saved(tmp_path, 1, seed=4)
    flags = (*TINY, "--num_heads", 2, "--frozen_trunk", base, "--save_dir", tmp_path / "save", "--epochs", 2)
    code, _, err = script("0Gaussian/train.py", *flags)
    assert code == 0, err
    (last,) = tmp_path.rglob("*-frozen-trunk/epoch2.pth")
    there, here = (checkpoint_file.read(path)["state_dict"] for path in (base, last))
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
    torch.save(checkpoint_file.read(base)["state_dict"], tmp_path / "weights.pth")
    code, _, err = script("0Gaussian/train.py", *TINY, "--frozen_trunk", tmp_path / "weights.pth")
    assert code == 2 and "does not say its architecture" in err


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_trunk_that_normalises_otherwise_is_refused(tmp_path, name):
    spec = data_spec("digits")
    other = dataclasses.replace(spec, **{name: (0.25,)})
    recipe, path = Recipe(dataset="digits", arch="R8", num_heads=1), tmp_path / "a.pth"
    weights = build_classifier("R8", other, 1).state_dict()
    checkpoint_file.save(path, {"state_dict": weights, "data": other, "args": dataclasses.asdict(recipe)})
    with pytest.raises(UserError, match="normalises by"):
        take_trunk(build_classifier("R8", spec, 1), str(path), recipe, spec)


def test_a_frozen_trunk_is_in_eval_mode_at_once():
    network = build_classifier("R8", "digits", 2)[1].train()
    network.freeze_trunk()
    assert not network.bn1.training and network.heads[0].training
