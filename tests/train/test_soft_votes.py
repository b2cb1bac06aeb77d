"""The soft votes that CAT-RS learns: counted once, resumed, shared, and of the network that they are said to be of."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from children import Children
from conftest import SMALL, load_module
from test_bad_input import is_one_line

from spacte.data.sources import open_split
from spacte.files import lock, sha256
from spacte.logs.counts import read_counts
from spacte.model.checkpoint import load_classifier
from spacte.model.frozen import freeze
from spacte.smooth.smooth import Smooth
from spacte.train.settings import Recipe

CPU = torch.device("cpu")


@pytest.fixture
def catrs(script, digits_models, tmp_path):
    """Train CAT-RS for an epoch into a folder of its own: catrs("first", *flags) -> exit code, stdout, stderr."""

    def run(folder, *flags, model=digits_models[1]):
        where = [part for kind in ("save", "logs", "runs") for part in (f"--{kind}_dir", tmp_path / folder / kind)]
        own = ("--num_steps", 1, "--num_votes", 100, "--num_heads", 1, "--epochs", 1)
        model = () if model is None else ("--pretrained_model", model)
        return script("5CATRS/train.py", *SMALL, *own, *model, *where, *flags)

    return run


def test_a_folder_that_cannot_be_written_is_known_before_votes_are_counted(catrs, tmp_path):
    is_one_line(*catrs("first", "--save_dir", "/dev/null/save")[::2], "cannot write to '/dev/null/save")
    assert not (tmp_path / "votes").exists()


def votes_file(tmp_path):
    (path,) = (tmp_path / "votes").rglob("*-counts.jsonl")
    return path


def test_soft_votes_are_counted_once_resumed_and_shared(catrs, tmp_path, digits_models, split):
    """They are the smoothed pretrained network's; a count that was interrupted ends with the same ones."""
    code, out, err = catrs("first")
    assert code == 0 and "counting the pretrained network's votes" in out, err
    path = votes_file(tmp_path)
    whole = [(one.idx, one.label, one.estimation.tolist()) for one in read_counts(path)]
    assert [idx for idx, *_ in whole] == list(range(200))
    assert all(np.sum(votes) == 100 for *_, votes in whole)
    assert json.loads(path.with_name(path.name.replace("-counts.jsonl", ".json")).read_text())["config"]["N"] == 100
    right = np.mean([votes[-1][label] for _, label, votes in whole]) / 100
    smooth = Smooth(freeze(load_classifier(digits_models[1]).classifier, CPU, batch_size=100), 10, 0.5)
    fresh = [smooth.count_votes(split[idx][0], 100, 100)[-1, split[idx][1]] / 100 for idx in range(200)]
    assert abs(right - np.mean(fresh)) < 6 * 0.5 / 20_000**0.5 * 2**0.5

    before = path.read_bytes()
    code, out, err = catrs("second", "--seed", 1)
    assert code == 0 and "counting" not in out and path.read_bytes() == before, err

    lines = before.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:90]) + lines[90][:20])
    log = path.with_name(path.name.replace("-counts.jsonl", ".log"))
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:80]))
    code, out, err = catrs("third")
    assert code == 0 and "counting" in out, err
    assert [(one.idx, one.label, one.estimation.tolist()) for one in read_counts(path)] == whole
    logs = [next((tmp_path / folder / "logs").rglob("*-train.log")) for folder in ("first", "third")]
    first, third = (pd.read_csv(log, sep="\t").drop(columns="images_per_second") for log in logs)
    pd.testing.assert_frame_equal(first, third)  # the votes that were there or not move no draw of the training


def test_soft_votes_are_those_of_all_heads_together(catrs, tmp_path, digits_models):
    """The shares of the last voter, of a pretrained network of three heads."""
    recipe = Recipe(dataset="digits", arch="R8", num_heads=2, noise_sd=0.5)
    split = open_split("digits", "", True)
    split.keep_first_of_each_class(20)
    soft_votes = load_module("5CATRS", "soft_votes").soft_votes
    shares = soft_votes(str(digits_models[0]), 50, str(tmp_path / "votes"), split, recipe)
    counted = [one.estimation for one in read_counts(votes_file(tmp_path))]
    assert len(counted[0]) == 4 and any((votes[0] != votes[-1]).any() for votes in counted)
    assert shares.numpy() == pytest.approx(np.array([votes[-1] / 50 for votes in counted]))


def test_votes_that_another_run_counts_are_waited_for(catrs, tmp_path, monkeypatch):
    assert catrs("first")[0] == 0
    path = votes_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:90]))
    held, waits, sleep = lock(path, ""), [], time.sleep

    def the_other_counts(seconds):
        if seconds != 10:  # another thread's
            return sleep(seconds)
        waits.append(seconds)
        if len(waits) == 2:
            path.write_bytes(whole)
            held.close()

    monkeypatch.setattr(time, "sleep", the_other_counts)
    code, out, err = catrs("second")
    assert code == 0 and waits == [10, 10], err
    assert out.count("waiting for the pretrained network's votes: another run is writing 'votes/digits/") == 1
    assert path.read_bytes() == whole


def test_two_processes_count_the_votes_that_one_does(catrs, tmp_path, digits_models):
    assert catrs("first")[0] == 0
    one = [(counts.idx, counts.estimation.tolist()) for counts in read_counts(votes_file(tmp_path))]
    flags = ("5CATRS/train.py", *SMALL, "--num_steps", 1, "--num_votes", 100, "--num_heads", 1, "--epochs", 1)
    flags += ("--pretrained_model", digits_models[1], "--save_dir", "two")
    (tmp_path / "votes").rename(tmp_path / "votes-of-one")
    with Children(tmp_path, *flags, world=2) as children:
        assert children.exit_codes() == [0, 0]
    assert [(counts.idx, counts.estimation.tolist()) for counts in read_counts(votes_file(tmp_path))] == one


def test_a_pretrained_network_that_does_not_fit(catrs, tmp_path, digits_models):
    is_one_line(*catrs("x", model=None)[::2], "CAT-RS needs --pretrained_model: a checkpoint of 0Gaussian")
    is_one_line(*catrs("x", model="no.pth")[::2], "there is no checkpoint 'no.pth'")
    contents = torch.load(digits_models[1], weights_only=True)
    other = tmp_path / "other.pth"
    torch.save(contents | {"args": contents["args"] | {"dataset": "MNIST"}}, other)
    is_one_line(*catrs("x", model=other)[::2], "--dataset digits contradicts checkpoint")
    torch.save(contents | {"data": contents["data"] | {"class_names": ("a", "b")}}, other)
    is_one_line(*catrs("x", model=other)[::2], "the images' classes are not those of training")
    assert list(tmp_path.rglob("*")) == [other], "nor empty folders"


def test_votes_that_are_others(catrs, tmp_path, digits_models):
    """Of another split, and of another network that has the same name; a resumed run keeps to its network."""
    assert catrs("first")[0] == 0
    is_one_line(*catrs("x", "--train_images", 300)[::2], "are others: data_sha256 (")
    contents = torch.load(digits_models[1], weights_only=True)
    contents["state_dict"]["1.conv1.weight"] += 0.01
    torch.save(contents, tmp_path / "other.pth")
    is_one_line(*catrs("x", model=tmp_path / "other.pth")[::2], "are others: checkpoint_sha256 (")
    finished = catrs("first", "--resume", model=tmp_path / "other.pth")
    is_one_line(*finished[::2], "began with other networks")
    for checkpoint in (tmp_path / "first/save").rglob("epoch1.pth"):
        contents = torch.load(checkpoint, weights_only=True)
        torch.save(contents | {"args": contents["args"] | {"epochs": 2}}, checkpoint)
    flags = ("--resume", "--epochs", 2, "--votes_dir", tmp_path / "elsewhere")
    code, _, err = catrs("first", *flags, model=tmp_path / "other.pth")
    is_one_line(code, err, "began with other networks")
    assert not (tmp_path / "elsewhere").exists()


def test_a_released_checkpoint_tells_the_pretrained_network_by_name_and_hash(catrs, script, tmp_path, digits_models):
    """And one of an older version, which kept the hash elsewhere, is still resumed."""
    assert catrs("first")[0] == 0
    (last,) = (tmp_path / "first/save").rglob("epoch1.pth")
    assert script("release.py", last, "--output", tmp_path / "small.pth")[0] == 0
    small, contents = (torch.load(path, weights_only=True) for path in (tmp_path / "small.pth", last))
    assert small["inputs"] == contents["inputs"] == {"pretrained_model": [sha256(Path(digits_models[1]))]}
    assert small["args"]["pretrained_model"] == Path(digits_models[1]).name and "votes_dir" not in small["args"]
    (digest,) = contents.pop("inputs")["pretrained_model"]
    del contents["places"]
    for kept, code, line in (
        (digest, 0, "nothing is left to do"),
        ("0" * 64, 2, "is not the network that the run began"),
    ):
        torch.save(contents | {"objective": {"votes_of": kept}}, last)
        found, out, err = catrs("first", "--resume")
        assert found == code and line in out + err
