"""A defence of one's own: what its fields, flags and hooks must be, and the line that says what they are not."""

import enum
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import TINY, load_module

from spacte.data.sources import open_split
from spacte.model import build_classifier
from spacte.model.checkpoint import load_classifier
from spacte.model.checkpoint_file import save
from spacte.train import command
from spacte.train.command import main, parse
from spacte.train.release import release
from spacte.train.trainer import Trainer
from spacte.utils import UserError

CPU = torch.device("cpu")
FLAGS = [str(flag) for flag in (*TINY, "--train_images", 200, "--num_heads", 2, "--eps", 0.5, "--epochs", 1)]
Gaussian = load_module("0Gaussian", "train").Gaussian


class WithAFlag(Gaussian):
    @staticmethod
    def add_flags(parser):
        parser.add_argument("--strength", type=float)


@dataclass
class WithGamma(Gaussian):
    gamma: float = 2.0


@dataclass
class WithoutADefault(Gaussian):
    strength: float = field(kw_only=True)


@dataclass
class WithAList(Gaussian):
    steps: list[int] = field(default_factory=lambda: [1, 2])


class WithTheFlagOfAnother(Gaussian):
    @staticmethod
    def add_flags(parser):
        parser.add_argument("--gamma", type=float)


@pytest.mark.parametrize(("kind", "defaults", "message"), [
    (WithAFlag, {}, "WithAFlag has no field 'strength' for its flag --strength: is @dataclass missing"),
    (WithGamma, {}, "WithGamma.gamma: every run has a setting of this name"),
    (WithoutADefault, {}, "WithoutADefault.strength has no default"),
    (WithTheFlagOfAnother, {}, "WithTheFlagOfAnother.add_flags: conflicting option string: --gamma"),
    (Gaussian, {"num_noise_vecs": 4}, "no setting is called 'num_noise_vecs'"),
])  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(kind, defaults, message):
    with pytest.raises(UserError, match=message):
        parse(kind, "", FLAGS, **defaults)


def test_a_default_may_be_made_for_each_run():
    assert parse(WithAList, "", FLAGS)[2] == {"steps": [1, 2]}


def hooked(**hooks):
    """A trainer of a defence with these hooks, on 200 digits."""
    kind = type("Mine", (Gaussian,), hooks)
    recipe, _, own = parse(kind, "", FLAGS)
    digits = open_split("digits", "", True, CPU)
    digits.keep_first_of_each_class(200)
    classifier = build_classifier("R8", "digits", recipe.num_heads)
    return Trainer(recipe, kind(recipe, 10, **own), classifier, CPU, digits, digits)


def one(value):
    return lambda *given: value


@pytest.mark.parametrize(("hooks", "message"), [
    ({"mini_batches": one(0)}, "Mine.mini_batches returned 0"),
    ({"targets": one(torch.zeros(7))}, "Mine.targets returned 7 rows for 200 training images"),
    ({"targets": one([0.0] * 200)}, "Mine.targets returned a list, not a tensor"),
    ({"sampling_weights": one([1.0] * 9)}, "sampling weights must be 200 finite numbers"),
    ({"sampling_weights": one(torch.ones(200, 1))}, "sampling weights must be 200 finite numbers"),
    ({"__call__": one((torch.zeros(3), {}))}, r"Mine must return .* not \(a tensor \[3\], an empty dict\)"),
    ({"__call__": one(torch.zeros(()))}, "Mine must return a scalar tensor and a dict of scalar tensors"),
    ({"__call__": one((torch.zeros(()), {"ce": torch.zeros(1)}))}, "Mine must return a scalar tensor and a dict of"),
    ({"__call__": one((torch.zeros(()), {"epoch": torch.zeros(())}))}, "Mine calls a part of its loss 'epoch', as a"),
    ({"__call__": one((torch.zeros(()), {"acc0": torch.zeros(())}))}, "Mine calls a part of its loss 'acc0', as a"),
    ({"__call__": one((torch.zeros(()), {"ce": 1.0}))}, r"not \(a scalar tensor, a dict of ce: a float\)"),
])  # fmt: skip
def test_what_a_hook_returns_wrongly_is_named(hooks, message):
    with pytest.raises(UserError, match=message):
        trainer = hooked(**hooks)
        trainer.prepare()
        list(trainer.epochs())


class Kind(enum.Enum):
    HARD = 1


@pytest.mark.parametrize(("contents", "message"), [
    ({"objective": {"history": deque([1])}}, r"\['objective'\]\['history'\] is no tensor, number"),
    ({"args": {"kind": Kind.HARD}}, r"\['args'\]\['kind'\] is no tensor, number"),
])  # fmt: skip
def test_a_checkpoint_that_could_not_be_read_again_is_not_written(tmp_path, contents, message):
    trainer = hooked()
    with pytest.raises(UserError, match=message):
        save(tmp_path / "a.pth", trainer.state() | contents)
    assert not list(tmp_path.iterdir())


@dataclass
class WithAPath(Gaussian):
    weights: Path | None = None

    @staticmethod
    def add_flags(parser):
        parser.add_argument("--weights", type=Path)


def test_a_setting_may_be_a_path(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *FLAGS, "--weights", "x.pt"])
    main(WithAPath, "", lbdlast=1.0)
    (checkpoint,) = (tmp_path / "save").rglob("epoch1.pth")
    assert load_classifier(str(checkpoint)).training["weights"] == Path("x.pt")
    code, out, err = script("certify_mhead.py", "--model_path", checkpoint, "--N", 100, "--max", 4, "--device", "cpu")
    assert code == 0, out + err


@dataclass
class WithAPrior(Gaussian):
    inputs = ("prior",)
    prior: Path | None = None

    @staticmethod
    def add_flags(parser):
        parser.add_argument("--prior", type=Path)


@pytest.mark.parametrize(("begun_with", "resumed_with"), [
    ("", ""), ("a", "a"), ("a", "moved"), ("", "a"), ("a", ""), ("a", "b"),
])  # fmt: skip
def test_a_run_is_resumed_with_the_inputs_that_it_began_with(tmp_path, monkeypatch, begun_with, resumed_with):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(name).write_text(name)
    Path("moved").write_text("a")

    def train(prior, epochs):
        flags = (*FLAGS[:-1], str(epochs), "--resume", *(("--prior", prior) if prior else ()))
        recipe, place, own = parse(WithAPrior, "", list(flags))
        command.train(WithAPrior, recipe, place, own)

    train(begun_with, 2)
    (last,) = tmp_path.rglob("epoch2.pth")
    last.unlink()
    if (begun_with, resumed_with) in (("", ""), ("a", "a"), ("a", "moved")):
        train(resumed_with, 2)
        release(last, tmp_path / "small.pth")
        contents = torch.load(tmp_path / "small.pth", weights_only=True)
        assert contents["args"]["prior"] == (resumed_with or None)
        assert list(contents.get("inputs", {})) == ["prior"] * bool(begun_with)
    else:
        with pytest.raises(UserError, match=r"--prior .*: the run in .* began with other networks"):
            train(resumed_with, 2)


def test_an_input_that_is_not_there_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--prior: there is no checkpoint 'gone\.pth'"):
        command.train(WithAPrior, *parse(WithAPrior, "", [*FLAGS, "--prior", "gone.pth"]))
    assert not list(tmp_path.iterdir())


def test_a_run_of_which_no_checkpoint_can_be_read_is_not_begun_again(script, tmp_path):
    flags = ("0Gaussian/train.py", *FLAGS, "--resume")
    assert script(*flags)[0] == 0
    (only,) = (tmp_path / "save").rglob("epoch1.pth")
    only.write_bytes(only.read_bytes()[:1000])
    code, _, err = script(*flags)
    assert code == 2 and "has no readable checkpoint: remove it to begin again" in err
    assert len(only.read_bytes()) == 1000


def test_a_lambda_that_would_rise_is_remarked_on(script):
    code, _, err = script("0Gaussian/train.py", *FLAGS, "--lbdlast", 2.4)
    assert code == 0 and "--lbdlast 2.4 is above 2.30, the loss of guessing among 10 classes" in err
