"""Training runs on digits with the smallest network: files, names, what stops a run."""

import os
import re

import pandas as pd
import pytest
import torch
from conftest import CODES, DEFENCES, TINY, load_module, same
from objectives import objective_of, trainer_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spacte.data.sources import open_split
from spacte.files import lock
from spacte.model import build_classifier
from spacte.names import run_name_of_today
from spacte.train.command import parse
from spacte.train.meter import LossMeter
from spacte.train.objective import Objective
from spacte.train.settings import Place, Recipe, available_workers
from spacte.train.trainer import Trainer
from spacte.utils import RunError, UserError

RUN = {
    "0Gaussian": "m-2-lbdlast-1.2",
    "1Consistency": "m-2-lbdlast-1.0-lbd-20.0",
    "2SmoothMix": "m-2-lbdlast-1.6",
    "3SmoothAdv": "m-4-lbdlast-1.6-epsilon-0.25-steps-2",
    "4MACER": "m-4-lbdlast-1.2-lbd-12.0",
    "5CATRS": "m-4-lbdlast-1.6-epsilon-1.0-steps-1-lbd-0.5",
    "6ACRWeakness": "m-4-lbdlast-1.6-ds-1-0.05-steps-1-epsilon-0.25",
    "7Stability": "m-1-lbdlast-1.2-lbd-2.0",
}
PARTS = {
    "1Consistency": ["con"],
    "2SmoothMix": ["mix"],
    "4MACER": ["cl", "rl"],
    "5CATRS": ["low", "high", "mask"],
    "6ACRWeakness": ["kept"],
    "7Stability": ["stability"],
}
TAIL = "digits/R8/noise-0.50"


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_run_leaves_checkpoints_logs_and_tensorboard(script, tmp_path, own_flags, defence):
    flags = (*TINY, *own_flags(defence), "--train_images", 200, "--num_heads", 3, "--epochs", 3, "--save_freq", 2)
    code, out, err = script(f"{defence}/train.py", *flags)
    assert code == 0, err
    run = f"h-3-eps-0.8-{RUN[defence]}-images-200"
    saved = sorted(path.name for path in (tmp_path / "save" / TAIL / run).glob("*.*"))
    assert saved == ["epoch1.pth", "epoch2.pth", "epoch3.pth"]

    contents = torch.load(tmp_path / "save" / TAIL / run / "epoch3.pth", weights_only=True)
    about = {"args", "places", "data", "data_sha256", "versions", "run", "defence"}
    about |= {"source_sha256", "commit", "dirty", "log"}
    expected = about | {"state_dict", "optimizer", "scheduler", "epoch", "rng"}
    assert set(contents) - {"objective", "inputs"} == expected
    assert ("objective" in contents) == (defence == "6ACRWeakness")
    assert contents.get("inputs", {}).keys() == ({"pretrained_model"} if defence == "5CATRS" else set())
    assert contents["epoch"] == 3 and contents["args"]["num_heads"] == 3 and contents["data"]["shape"] == (1, 8, 8)

    log = pd.read_csv(tmp_path / "logs" / TAIL / "train" / f"{run}-train.log", sep="\t")
    parts = [
        "loss",
        "ce",
        "cos",
        *PARTS.get(defence, []),
        "weight",
        "easy",
        "head0",
        "head1",
        "head2",
        "images_per_second",
    ]
    assert list(log) == ["epoch", "lr", "lambda", *parts, "acc", "acc0", "acc1", "acc2"]
    assert log["epoch"].tolist() == [1, 2, 3] and log["lambda"].iloc[-1] == pytest.approx(float(RUN[defence][12:15]))
    assert out.count("epoch ") == 3

    events = EventAccumulator(str(tmp_path / "runs" / TAIL / run)).Reload()
    for part in parts[:-1]:
        tag = f"run/{part}" if part in ("weight", "easy") else f"loss/{part}"
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(log[part].tolist(), rel=1e-4)


@pytest.mark.parametrize("defence", DEFENCES)
def test_one_head_trains_and_the_loss_falls(script, tmp_path, own_flags, defence):
    flags = (*own_flags(defence), "--num_heads", 1, "--num_noise_vec", 1, "--epochs", 4, "--lr_init", 0.05)
    code, out, _ = script(f"{defence}/train.py", *TINY, *flags, "--train_images", 700, "--batch_size", 128)
    (path,) = (tmp_path / "logs").rglob("*-train.log")
    log = pd.read_csv(path, sep="\t")
    assert code == 0 and path.name.startswith("h-1-m-1-") and "lbdlast" not in path.name, "they change nothing"
    assert "lambda" not in log and "lambda" not in out and (log["easy"] == 1).all()
    assert log["ce"].iloc[-1] < 0.8 * log["ce"].iloc[0] and (log["cos"] == 0).all() and (log["weight"] == 1).all()


def test_how_often_test_images_are_looked_at_changes_nothing_else(script, tmp_path):
    flags = (*TINY, "--train_images", 200, "--num_heads", 2, "--epochs", 4)
    assert script("0Gaussian/train.py", *flags)[0] == 0
    code, out, _ = script("0Gaussian/train.py", *flags, "--test_freq", 3, "--save_dir", "rare", "--logs_dir", "rare")
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert code == 0 and ["noisy accuracy" in line for line in lines] == [True, False, True, True]
    every, rare = (
        pd.read_csv(next((tmp_path / folder).rglob("*-train.log")), sep="\t").drop(columns="images_per_second")
        for folder in ("logs", "rare")
    )
    assert rare[["acc", "acc0", "acc1"]].isna().all(axis=1).tolist() == [False, True, False, False]
    pd.testing.assert_frame_equal(rare, every.where(rare.notna()))
    weights = [torch.load(next((tmp_path / one).rglob("epoch4.pth")), weights_only=True) for one in ("save", "rare")]
    assert same(weights[0]["state_dict"], weights[1]["state_dict"])


@pytest.mark.parametrize(("defence", "vectors", "fewest"), [
    ("0Gaussian", 1, 2), ("0Gaussian", 4, 4), ("4MACER", 4, 2), ("7Stability", 1, 2), ("7Stability", 4, 8),
])  # fmt: skip
def test_every_pass_of_a_last_batch_has_two_images_to_compare(defence, vectors, fewest):
    """Stability training's clean images pass alone, an image of the others beside its noisy copies."""
    assert trainer_of(defence, 1437, "--num_noise_vec", vectors, "--batch_size", 8).smallest == fewest


@pytest.mark.parametrize(("images", "batch_size", "steps"), [
    (1437, 128, 12), (1390, 125, 11), (1390, 256, 6), (1310, 256, 5), (1320, 256, 6), (30, 256, 1),
])  # fmt: skip
def test_a_last_batch_of_less_than_an_eighth_is_left_out(images, batch_size, steps):
    """Else it would be m whole steps on few images. One that is all of an epoch stays."""
    assert trainer_of("0Gaussian", images, "--batch_size", batch_size).steps == steps * 2


def test_how_often_accuracy_is_looked_at_changes_no_draw(monkeypatch):
    """Nor do a test split's workers, which take a number from torch's generator for each pass over it."""
    digits = open_split("digits", "", True)
    digits.keep_first_of_each_class(50)
    batches = type(digits).batches
    monkeypatch.setattr(type(digits), "batches", lambda *args: torch.rand(3) is not None and batches(*args))
    after = []
    for every in (1, 3):
        objective = objective_of("0Gaussian", "--dataset", "digits", "--arch", "R8", "--epochs", 3, "--num_heads", 1)
        torch.manual_seed(0)
        network = build_classifier("R8", "digits", 1)
        trainer = Trainer(objective.recipe, objective, network, torch.device("cpu"), digits, digits)
        assert len(list(trainer.epochs(every))) == 3
        after.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert torch.equal(*after)


def test_a_run_is_trained_by_one_process(script, tmp_path, trained):
    (log,) = (tmp_path / "logs").rglob("*-train.log")
    other = tmp_path / "other" / trained.parent.relative_to(tmp_path / "save")
    other.mkdir(parents=True)
    before = log.read_text()
    with lock(other / "lock", ""):
        code, _, err = script("0Gaussian/train.py", *TINY, "--num_heads", 2, "--epochs", 1, "--save_dir", "other")
    assert code == 75 and "another process is training 'other/digits/" in err and err.count("\n") == 1
    assert log.read_text() == before and len(list(log.parent.iterdir())) == 1


def test_each_seed_begins_with_its_own_weights(script, tmp_path):
    weights = []
    for seed in (1, 2):
        flags = ("--num_heads", 1, "--epochs", 1, "--train_images", 200, "--lr_init", 1e-30, "--seed", seed)
        assert script("0Gaussian/train.py", *TINY, *flags, "--save_dir", f"save-{seed}")[0] == 0
        (path,) = (tmp_path / f"save-{seed}").rglob("epoch1.pth")
        weights.append(torch.load(path, weights_only=True)["state_dict"]["1.conv1.weight"])
    assert not torch.allclose(*weights)


def test_a_new_run_spares_the_logs_of_another(script, trained, tmp_path):
    """Two seeds have one name: with another --save_dir, the first one's log and TensorBoard files are kept."""
    (log,) = (tmp_path / "logs").rglob("*-train.log")
    (events,) = (tmp_path / "runs").rglob("events*")
    before = log.read_text()
    code, out, err = script(
        "0Gaussian/train.py", *TINY, "--num_heads", 2, "--epochs", 1, "--seed", 1, "--save_dir", "second"
    )
    assert code == 0 and "-train.log.1'" in out, err
    assert log.with_name(log.name + ".1").read_text() == before != log.read_text()
    kept = events.parent.with_name(events.parent.name + ".1")
    assert [path.name for path in kept.iterdir()] == [events.name] and not events.exists()


NAMES = [
    ({}, "h-5-eps-0.8-m-2-lbdlast-1.2"),
    ({"num_heads": 1}, "h-1-m-2"),
    ({"num_heads": 1, "lbdlast": 1e-05, "eps": 1e-05, "paced_by": "none"}, "h-1-m-2-no-teaching"),
    ({"num_heads": 1, "train_images": 5000, "teachers": ("a", "b")}, "h-1-m-2-teachers-2-images-5000"),
    ({"num_heads": 1, "lbdlast": 0.8, "paced_by": "self"}, "h-1-m-2-lbdlast-0.8-paced-by-self"),
]


@pytest.mark.parametrize(("settings", "name"), NAMES)
def test_a_runs_name_says_what_it_uses(settings, name):
    """An older name reads as today's, in ensembles, too."""
    recipe = Recipe(**settings)
    older = recipe.older_name + recipe.variant
    assert recipe.name + recipe.variant == run_name_of_today(older) == run_name_of_today(name) == name
    assert older.startswith(f"h-{recipe.num_heads}-eps-{recipe.eps}-m-2-lbdlast-{recipe.lbdlast}")
    assert run_name_of_today(f"h-2-eps-0.8-m-2-lbdlast-1.2+{older}x2") == f"h-2-eps-0.8-m-2-lbdlast-1.2+{name}x2"


def test_bf16_training_runs(script, tmp_path):
    code, _, err = script(
        "2SmoothMix/train.py", *TINY, "--num_heads", 2, "--epochs", 1, "--train_images", 200, "--precision", "bf16"
    )
    assert code == 0, err
    (path,) = (tmp_path / "save").rglob("epoch1.pth")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(script, tmp_path):
    code, _, err = script("0Gaussian/train.py", *TINY, "--num_heads", 2, "--epochs", 3, "--lr_init", 1e30)
    assert code == 1
    assert re.search(r"the loss is not finite in epoch 1, step \d+: loss \S+, ce \S+, cos \S+, weight", err)
    assert not list(tmp_path.rglob("*.pth"))


def test_the_first_step_that_is_not_finite_is_named():
    meter = LossMeter(epoch=7)
    for value, images in ((1.0, 4), (2.0, 12)):
        meter.add({"loss": torch.tensor(value), "ce": torch.tensor(0.5)}, images)
    meter.flush()
    assert meter.means() == {"loss": 1.75, "ce": 0.5} and meter.images == 16
    meter.add({"loss": torch.tensor(1.0), "ce": torch.tensor(0.5)}, 4)
    meter.add({"loss": torch.tensor(float("inf")), "ce": torch.tensor(float("nan"))}, 4)
    with pytest.raises(RunError, match="epoch 7, step 4: loss inf, ce nan"):
        meter.flush()
    with pytest.raises(UserError, match="the loss has the parts loss, kl in one step, and loss, ce in another"):
        meter.add({"loss": torch.tensor(1.0), "kl": torch.tensor(0.5)}, 4)


def test_defaults_are_the_papers_cifar10_setting():
    for defence, lbdlast, extra in (
        ("0Gaussian", 1.2, {}),
        ("1Consistency", 1.0, {"lbd": 20.0, "eta": 0.5}),
        ("2SmoothMix", 1.6, {"num_steps": 4, "attack_alpha": 0.5, "mix_step": 0, "eta": 5.0, "warmup": 10}),
        ("3SmoothAdv", 1.6, {"epsilon": 1.0, "num_steps": 10, "warmup": 10}),
        ("4MACER", 1.2, {"lbd": 12.0, "beta": 16.0, "margin": 8.0, "deferred": False}),
        ("5CATRS", 1.6, {"epsilon": 1.0, "num_steps": 4, "lbd": 0.5, "num_votes": 10_000, "confidence_mask": False}),
        ("6ACRWeakness", 1.6, {"ds_epoch": 60, "ds_threshold": 0.5, "dataset_weight_epoch": 10, "attack_steps": 3,
                               "num_noise_dataset_weight": 16, "num_noise_ds": 100, "epsilon": 0.25}),
        ("7Stability", 1.2, {"lbd": 2.0}),
    ):  # fmt: skip
        module = load_module(defence, "train")
        objective = getattr(module, defence[1:])
        recipe, _, own = parse(objective, "", [], lbdlast=lbdlast)
        paper = {
            "arch": "R110", "dataset": "CIFAR10", "num_heads": 5, "num_noise_vec": 2, "eps": 0.8, "epochs": 150,
            "batch_size": 256, "lr_init": 0.1, "lr_step_size": 50, "gamma": 0.1, "wd": 1e-4, "noise_sd": 0.25,
        }  # fmt: skip
        flags = vars(recipe) | own
        assert flags | paper | extra == flags
        assert f"lbdlast={lbdlast}" in (CODES / defence / "train.py").read_text()


def test_flags_default_to_what_the_settings_default_to():
    """But for the precision: the flag's "auto" is settled by the device, older checkpoints had float32."""
    recipe, place, own = parse(Objective, "", [])
    assert recipe == Recipe(precision="auto") and place == Place() and own == {}


@pytest.mark.parametrize(("cores", "processes", "workers"), [
    (6, None, 6), (32, None, 16), (64, 8, 8), (256, 8, 16), (2, 4, 1),
])  # fmt: skip
def test_files_are_read_by_as_many_processes_as_there_are_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert available_workers() == workers


def test_a_checkpoint_says_how_many_processes_read_files(trained):
    """The random crops of images that are read from files depend on it."""
    assert torch.load(trained, weights_only=True)["args"]["workers"] == available_workers()


def test_macer_takes_one_step_for_a_whole_batch():
    trainer = trainer_of("4MACER", 1437, "--num_noise_vec", 4, "--batch_size", 256)
    assert trainer.mini_batches == 1 and trainer.steps == 6
