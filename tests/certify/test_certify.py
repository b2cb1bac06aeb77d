"""Certification runs on digits: files, configurations, continuation, what may and may not change a count."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from conftest import RUN_FLAGS, beside, golden, without_time

from spacte.certify.base_classifier import ComputeSettings
from spacte.certify.certify import CertifySettings
from spacte.data.sources import open_split
from spacte.data.spec import DataSpec
from spacte.data.splits import InMemory
from spacte.files import lock
from spacte.logs import certlog
from spacte.logs.certified import log_table
from spacte.logs.certlog import average_certified_radius, certified_accuracy, format_row, read_log, round_down
from spacte.logs.counts import VoteCounts, read_counts
from spacte.logs.runfiles import RunFiles
from spacte.logs.table import table_radii
from spacte.model.checkpoint import load_classifier
from spacte.model.frozen import freeze
from spacte.model.passes import FixedPasses
from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import VoteRequest
from spacte.utils import UserError, derived_seed


@pytest.fixture
def certify(script, trained, tmp_path):
    """Certify with the trained checkpoint and more flags: (exit code, stdout, stderr, log)."""

    def run(*flags, logs="logs", skip=30):
        common = ("--model_path", trained, "--logs_dir", logs, "--skip", skip)
        result = script("0Gaussian/certify_mhead.py", *common, *RUN_FLAGS, *flags)
        name = f"h-2-eps-0.8-m-2-lbdlast-1.2-certify-skip-{skip}.log"
        return *result, tmp_path / logs / "digits/R8/noise-0.50/certify-mhead" / name

    return run


def test_a_run_leaves_log_counts_configuration_and_summary(certify):
    code, out, err, log = certify()
    assert code == 0, err
    assert log.read_text().startswith("idx\tlabel\tpredict\tradius\tcorrect\ttime\n")
    table = read_log(log)
    assert table["idx"].tolist() == list(range(0, 360, 30))
    votes = read_counts(beside(log, "-counts.jsonl"))
    assert [one.idx for one in votes] == table["idx"].tolist()
    for one in votes:
        assert one.selection.shape == (3, 10)
        assert one.selection.sum(1).tolist() == [20] * 3 and one.estimation.sum(1).tolist() == [200] * 3
    derived = log_table(votes, RunFiles(log).read_json().config)
    for column in ("idx", "label", "predict", "radius", "correct"):
        assert derived[column].tolist() == table[column].tolist()
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert {"dataset", "noise_sd", "N0", "N", "alpha", "seed", "precision", "checkpoint_sha256", "versions"} <= set(
        config
    )
    about = json.loads(beside(log, ".json").read_text())["about"]
    assert about["training"][0]["seed"] == 666 and len(about["source_sha256"]) == 64
    assert f"{average_certified_radius(table):.3f}" in beside(log, "-ACR.log").read_text() and "ACR" in out


def test_a_run_that_another_process_writes_is_to_be_tried_later(certify):
    """By the exit code on which SLURM's and Kubernetes' recipes act."""
    log = certify("--max", 30)[3]
    with lock(beside(log, "-counts.jsonl"), ""):
        code, _, err, _ = certify()
    assert code == 75 and "another run is writing" in err and len(read_log(log)) == 1


def test_an_images_noise_is_that_of_the_script_the_seed_and_its_idx(certify, trained):
    """Three images drawn here by the seeds that are documented."""
    votes = read_counts(beside(certify()[3], "-counts.jsonl"))[:3]
    split = open_split("digits", ".", train=False)
    smooth = Smooth(freeze(load_classifier(trained).classifier, torch.device("cpu"), batch_size=100), 10, 0.5)
    for one in votes:
        generator = torch.Generator().manual_seed(derived_seed("certify", 0, one.idx))
        (drawn,) = smooth.count_many([VoteRequest(split[one.idx][0], generator, Draws(20, 200), one.idx)], 100)
        assert (drawn.selection.tolist(), drawn.estimation.tolist()) == (
            one.selection.tolist(),
            one.estimation.tolist(),
        )


def test_counts_depend_on_seed_and_idx_alone(certify):
    """Not on what else is in the run: every 30th image of one run and every 60th below 200 of another agree."""
    counts = [beside(certify(*flags, logs=str(i), skip=skip)[3], "-counts.jsonl") for i, (skip, *flags) in enumerate(
        [(30,), (60, "--max", 200), (60, "--max", 200, "--seed", 1)]
    )]  # fmt: skip
    every, some, other = ({one.idx: one.estimation.tolist() for one in read_counts(path)} for path in counts)
    assert list(some) == [0, 60, 120, 180]
    assert all(every[idx] == some[idx] for idx in some)
    assert all(other[idx] != some[idx] for idx in some)


def test_a_longer_run_goes_on_where_the_shorter_ended(certify):
    log = certify("--max", 100)[3]
    before = log.read_text()
    assert certify()[0] == 0
    assert log.read_text().startswith(before) and len(read_log(log)) == 12
    again = log.read_text()
    assert certify()[0] == 0 and log.read_text() == again
    assert without_time(certify(logs="fresh")[3]) == without_time(log)


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize("ending", [".log", "-counts.jsonl"])
def test_a_line_cut_in_half_is_dropped(certify, ending, cut):
    log = certify("--max", 100)[3]
    whole, path = without_time(log), beside(log, ending)
    if ending == "-counts.jsonl":  # a crash in the middle of the counts leaves the log one row behind
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    path.write_bytes(path.read_bytes()[:-cut])
    assert certify("--max", 100)[0] == 0
    assert without_time(log) == whole and len(read_counts(beside(log, "-counts.jsonl"))) == 4


def test_two_configurations_are_never_mixed(certify):
    log = certify("--max", 40)[3]
    before = log.read_text()
    code, _, err, _ = certify("--max", 40, "--alpha", 0.01, "--seed", 3)
    assert code == 2 and "alpha (0.001 there, 0.01 here)" in err and "seed (0 there, 3 here)" in err
    assert log.read_text() == before
    assert certify("--max", 40, "--alpha", 0.01, "--overwrite")[0] == 0
    assert log.read_text() != before and len(read_log(log)) == 2


def test_a_refused_run_leaves_everything_as_it_was(certify, tmp_path):
    log = certify("--max", 40)[3]
    for path in (beside(log, ".json"), beside(log, "-counts.jsonl")):
        path.unlink()  # as if somebody else's program had written the log
    before = sorted(tmp_path.rglob("*"))
    code, _, err, _ = certify("--max", 40)
    assert code == 2 and "without a configuration; write to another folder to keep it" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_changes_when_a_run_goes_on_is_noted(certify):
    log = certify("--max", 40)[3]
    for images, *flags in ((100,), (160, "--batch_size", 64), (160, "--batch_size", 32), (40, "--batch_size", 32)):
        assert certify("--max", images, *flags)[0] == 0
    about = json.loads(beside(log, ".json").read_text())["about"]
    assert [(one["rows"], one["flags"]["max"], one["flags"]["batch_size"]) for one in about["earlier"]] == [
        (2, 40, 100), (4, 100, 100)
    ]  # fmt: skip
    assert about["flags"]["batch_size"] == 64 and about["flags"]["max"] == 160, "what counted nothing is not noted"


def test_rows_that_are_recovered_count_before_a_run_goes_on(certify):
    log = certify("--max", 100)[3]
    for path in (log, beside(log, "-counts.jsonl")):
        path.write_text(path.read_text()[:-9])  # cut in the last line, as by a full disk
    assert certify("--max", 100, "--batch_size", 64)[0] == 0
    (earlier,) = json.loads(beside(log, ".json").read_text())["about"]["earlier"]
    assert earlier["rows"] == 3


def test_overwrite_replaces_compressed_counts(certify):
    log = certify("--max", 100)[3]
    counts, before = beside(log, "-counts.jsonl"), without_time(log)
    packed = counts.with_name(f"{counts.name}.gz")
    packed.write_bytes(gzip.compress(counts.read_bytes()))
    counts.unlink()
    code, _, err, _ = certify("--max", 160)
    assert code == 2 and "is compressed: unpack it (gunzip) to resume" in err
    code, _, err, _ = certify("--max", 100, "--overwrite")
    assert code == 0 and without_time(log) == before, err
    assert counts.exists() and not packed.exists()


def test_files_that_do_not_belong_together_are_refused(certify):
    log = certify("--max", 100)[3]
    beside(log, "-counts.jsonl").write_text("")
    code, _, err, _ = certify("--max", 100)
    assert code == 2 and "do not belong together" in err


def test_bf16_certification_runs_and_is_recorded(certify):
    log = certify("--max", 100, "--precision", "bf16")[3]
    assert json.loads(beside(log, ".json").read_text())["config"]["precision"] == "bf16"
    assert len(read_log(log)) == 4


def test_votes_survive_their_line():
    votes = VoteCounts(7, 2, 1.25, np.array([[0, 5, 1], [6, 0, 0]]), np.array([[90, 0, 10], [0, 0, 100]]))
    again = VoteCounts.from_line(votes.to_line())
    assert (again.idx, again.label, again.seconds) == (7, 2, 1.25)
    assert (again.selection == votes.selection).all() and (again.estimation == votes.estimation).all()


# --- the log's format ---


@pytest.mark.parametrize("radius", [0.0, 1.4999999, 1.5, 0.1 + 0.2, 3.8114, 1 / 3, 1.23456789e-5, 12.3456789])
def test_a_logged_radius_is_never_larger_than_the_certified_one(radius):
    text = round_down(radius)
    assert float(text) <= radius and radius - float(text) <= 1e-5 * radius and "e" not in text.lower()


def test_1_499_is_not_counted_at_1_5():
    assert round_down(1.49999999) == "1.49999" and round_down(1.5) == "1.5"


def test_rows_read_back(tmp_path):
    rows = [(0, 3, 3, 0.5461234, 12.5), (20, 7, -1, 0.0, 0.01), (40, 1, 2, 0.9, 3700.0)]
    path = tmp_path / "a.log"
    path.write_text(certlog.HEADER + "".join(format_row(*row) for row in rows))
    table = read_log(path)
    assert table["correct"].tolist() == [1, 0, 0] and table["radius"].tolist() == [0.546123, 0.0, 0.9]
    assert table["time"].tolist()[0] == "0:00:12.500000"
    assert average_certified_radius(table) == pytest.approx(0.546123 / 3)
    assert certified_accuracy(table, [0, 0.5, 0.6]).tolist() == pytest.approx([1 / 3, 1 / 3, 0])


def test_the_authors_format_is_read(tmp_path):
    path = tmp_path / "authors.log"
    path.write_text(
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.546\t1\t0:00:16.120055\n20\t7\t-1\t0.0\t0\t0:00:12\n"
    )
    assert average_certified_radius(read_log(path)) == pytest.approx(0.273)


def test_what_is_no_log_is_refused(tmp_path):
    path = tmp_path / "x.log"
    path.write_text("")
    with pytest.raises(UserError, match=r"x.log' is not a certification log"):
        read_log(path)
    path.write_text("a\tb\n1\t2\n")
    with pytest.raises(UserError, match="no column idx, label"):
        read_log(path)


def test_table_radii_reach_the_limit():
    assert table_radii(0.96).tolist() == [0, 0.25, 0.5, 0.75]
    assert table_radii(1.0).tolist() == [0, 0.25, 0.5, 0.75, 1.0]


def test_golden_radii_survive_the_log():
    """Rounding to six digits costs less than 1e-5 of a radius."""
    for case in golden("losses")["certify_cases"]:
        if case["radius"]:
            assert math.isclose(float(round_down(case["radius"])), case["radius"], rel_tol=1e-5)


def test_the_defaults_are_cohens():
    assert (CertifySettings().N0, CertifySettings().N, CertifySettings().alpha) == (100, 100_000, 0.001)


def test_a_batch_on_a_gpu_has_as_many_images_as_keep_it_busy():
    """Draws fill whole batches; a batch is filled by whole images."""

    def size(asked, device, shape, draws=100_000):
        images = torch.zeros(1, *shape, dtype=torch.uint8)
        split = InMemory(DataSpec("data", shape, 2, (0.0,), (1.0,)), images, torch.zeros(1, dtype=torch.long))
        return ComputeSettings(torch.device(device), "bf16", asked, False, draws, {}).batch_size(split)

    assert [size(None, "cuda", (3, side, side)) for side in (8, 32, 64, 224)] == [4000, 4000, 1021, 256]
    assert [size(None, "cuda", (3, 32, 32), draws) for draws in (10_000, 4097, 4096, 1000, 16)] == [
        3334, 2049, 4096, 4000, 4096,
    ]  # fmt: skip
    assert size(None, "cuda", (160_000,)) == 26 and size(None, "cuda", (5,)) == 4000
    assert size(None, "cpu", (3, 32, 32)) == 1000 and size(64, "cuda", (3, 32, 32)) == 64


@pytest.mark.parametrize("command", ["certify_mhead.py", "predict_mhead.py"])
def test_the_json_says_how_many_images_a_pass_held_at_the_end(script, digits_models, tmp_path, monkeypatch, command):
    """Here the memory suffices for 30."""
    run = FixedPasses._pass

    def out_of_memory(self, stage, inputs, size, *more):
        if size > 30:
            raise torch.OutOfMemoryError
        return run(self, stage, inputs, size, *more)

    monkeypatch.setattr(FixedPasses, "_pass", out_of_memory)
    flags = ("--model_path", digits_models[0], "--skip", 60, "--N", 200, "--batch_size", 100, "--device", "cpu")
    code, _, err = script(command, *flags)
    assert code == 0 and "from here on 25 images per pass" in err
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["about"]["images_per_pass"] == 25
