"""A run's files while they are written: what was changed by hand is seen, what cannot be written is one line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import RUN_FLAGS, beside, without_time

from spacte.certify import writer
from spacte.certify.writer import append, writing
from spacte.logs.certlog import read_log
from spacte.logs.config import RunConfig
from spacte.logs.counts import VoteCounts
from spacte.logs.plans import CertifyPlan
from spacte.logs.runfiles import RunFiles
from spacte.utils import UserError


def certify_again(script, model, log, *flags):
    folder = log.parents[4].name
    command = ("--model_path", model, "--logs_dir", folder, "--skip", 30, *RUN_FLAGS, *flags)
    return script("0Gaussian/certify_mhead.py", *command)


@pytest.mark.parametrize("column", ["label", "predict", "radius", "correct"])
def test_a_row_that_was_edited_by_hand_is_not_gone_on_with(certify, script, digits_models, column):
    log = certify("a", "--max", 100)
    table = pd.read_csv(log, sep="\t", dtype=str)
    table.loc[1, column] = "9.5" if column == "radius" else "1" if table.loc[1, column] == "0" else "0"
    table.to_csv(log, sep="\t", index=False)
    code, _, err = certify_again(script, digits_models[0], log)
    assert code == 2 and "do not belong together" in err and err.count("\n") == 1


def test_counts_that_were_edited_are_not_gone_on_with(certify, script, digits_models):
    log = certify("a", "--max", 100)
    counts = beside(log, "-counts.jsonl")
    first, *others = counts.read_text().splitlines(keepends=True)
    fields = json.loads(first)
    fields["estimation"][0] = {"0": 1}
    counts.write_text("".join([json.dumps(fields) + "\n", *others]))
    code, _, err = certify_again(script, digits_models[0], log)
    assert code == 2 and "-counts.jsonl', line 1: not a vote count: the voters' draws differ" in err


def test_a_full_disk_is_one_line():
    with pytest.raises(UserError, match=r"cannot write '/dev/full': No space left on device"):
        append("/dev/full", "x" * 100_000)


def test_files_that_cannot_be_written_are_one_line(certify, script, digits_models):
    log = certify("a", "--max", 100)
    counts = beside(log, "-counts.jsonl")
    counts.unlink()
    counts.mkdir()
    code, _, err = certify_again(script, digits_models[0], log)
    assert code == 2 and f"cannot write '{counts.relative_to(log.parents[5])}': Is a directory" in err


def test_a_run_goes_on_under_the_configuration_that_an_older_program_wrote(certify, script, digits_models):
    """With the versions of packages that decide no vote, and without the fields that came later."""
    log = certify("a", "--max", 100)
    content = json.loads(beside(log, ".json").read_text())
    content["config"]["versions"] |= {"python": content["config"]["versions"]["python"] + ".2", "pandas": "0.1"}
    for name in ("commit", "dirty", "packages"):
        del content["about"][name]
    beside(log, ".json").write_text(json.dumps(content))
    code, _, err = certify_again(script, digits_models[0], log)
    assert code == 0, err
    assert len(read_log(log)) == 12 and without_time(log) == without_time(certify("fresh"))
    assert len(json.loads(beside(log, ".json").read_text())["about"]["commit"]) == 40


def test_images_beyond_a_smaller_max_stay_and_are_named(certify, script, digits_models):
    log = certify("a", "--max", 100)
    before = log.read_bytes()
    code, _, err = certify_again(script, digits_models[0], log, "--max", 31)
    assert code == 0 and err.count("\n") == 1 and "holds images beyond --max (2): they stay in its summary" in err
    assert log.read_bytes() == before


def test_logits_that_are_not_finite_vote_for_nobody(script, certify, digits_models, tmp_path):
    """Weights that overflow: certify, predict and attack stop with a line that names the image."""
    contents = torch.load(digits_models[0], weights_only=True)
    contents["state_dict"]["1.heads.0.1.weight"] *= 1e38
    torch.save(contents, tmp_path / "broken.pth")
    common = ("--model_path", tmp_path / "broken.pth", "--skip", 30, "--N", 200, "--device", "cpu")
    log = certify("a", "--max", 100)
    beside(log, ".json").unlink()
    for name, *flags in (
        ("certify_mhead.py",), ("predict_mhead.py",), ("attack_mhead.py", "--log", log, "--radii", 0.5)
    ):  # fmt: skip
        code, _, err = script(f"0Gaussian/{name}", *common, *flags)
        last = err.splitlines()[-1]
        assert code == 1 and "stopped: the classifier's logits are not finite on" in last and "of image idx 0" in last


def test_merging_never_replaces_what_it_merges(certify, script):
    shard = certify("a", "--shard", "1/1")
    renamed = shard.with_name("renamed.log")
    for ending in (".log", ".json", "-counts.jsonl"):
        beside(shard, ending).rename(beside(renamed, ending))
    before = renamed.read_text()
    code, _, err = script("merge_logs.py", renamed, "--overwrite")
    assert code == 2 and "was renamed: its name must hold '-shard-1-of-1'" in err and renamed.read_text() == before


@pytest.mark.parametrize("without", ["kind", "N", "flags", "images"])
def test_a_configuration_without_its_fields_is_one_line(certify, script, without):
    log = certify("a", "--max", 100)
    content = json.loads(beside(log, ".json").read_text())
    content["config"].pop(without, None)
    content["about"].pop(without, None)
    beside(log, ".json").write_text(json.dumps(content))
    code, _, err = script("relog.py", log, "--alpha", 0.01)
    assert code == 2 and err.count("\n") == 1 and f"{log.stem}.json'" in err


CONFIG = RunConfig(
    kind="certify", dataset="toy", arch="toy", noise_sd=0.5, num_heads=1, N0=10, N=100, alpha=0.01, skip=1
)
VOTES = [
    VoteCounts(idx, 1, 1.0, *(np.array([[n - 9 * n // 10, 9 * n // 10]] * 2) for n in (10, 100))) for idx in range(6)
]


def written_to(folder):
    """A run of six images, on from what is there: the log and the counts."""
    files = RunFiles(folder / "toy.log")
    with writing(files, CertifyPlan(CONFIG), {}, list(range(6))) as run:
        for idx in run.missing:
            run.write(VOTES[idx])
    return without_time(files.log), files.counts.read_text()


@pytest.mark.parametrize("number", range(1, 14))
def test_a_run_cut_off_in_any_write_ends_with_the_uninterrupted_files(tmp_path, monkeypatch, number):
    """The log's header, then each image's votes and its row: half of the write of that number is on the disk."""
    expected, real, done = written_to(tmp_path / "whole"), writer.append, []

    def cut(path, text):
        done.append(path)
        real(path, text if len(done) < number else text[: len(text) // 2])
        if len(done) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "append", cut)
        written_to(tmp_path / "cut")
    assert len(done) == number and written_to(tmp_path / "cut") == expected


@pytest.mark.parametrize("content", [b"\0\0\n", b"\xff\xff\n"])
def test_a_damaged_part_of_a_divided_run_is_named(certify, script, digits_models, content):
    log = certify("a", "--max", 60)
    part = beside(log, "-part-0.jsonl")
    part.write_bytes(content)
    code, _, err = certify_again(script, digits_models[0], log)
    assert code == 2 and f"{part.name}' is damaged: " in err and "; remove it to count its images again" in err
    part.unlink()
    code, _, err = certify_again(script, digits_models[0], log)
    assert code == 0 and len(read_log(log)) == 12, err
