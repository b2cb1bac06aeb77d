"""Runs that are killed, divided, merged and made again; ensembles and single heads; prediction and attack."""

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import CODES, TINY, load_module
from scipy import stats

from spacte import training
from spacte.bounds import anytime_lower_bound
from spacte.certlog import average_certified_radius, read_log
from spacte.counts import read_votes

FLAGS = ("--N0", 20, "--N", 200, "--device", "cpu", "--batch_size", 100)


@pytest.fixture(scope="session")
def digits_models(tmp_path_factory):
    """Two trained networks, of 3 heads and of 1, 4 epochs on digits: the paths of their checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    sys.modules["circular_teaching"] = load_module("0Gaussian", "circular_teaching")
    gaussian = load_module("0Gaussian", "train").Gaussian
    paths = []
    with contextlib.chdir(folder):
        for heads in (3, 1):
            flags = (*TINY, "--num_heads", heads, "--epochs", 4, "--lr_step_size", 3, "--batch_size", 128)
            training.train(training._flags(gaussian, "", 1.2).parse_args([str(flag) for flag in flags]), gaussian)
            paths.append(folder / f"save/digits/R8/noise-0.50/h-{heads}-eps-0.8-m-2-lbdlast-1.2/epoch4.pth")
    return paths


@pytest.fixture
def certify(script, digits_models, tmp_path):
    """Certify with the 3-head network, or `models`: the log's path; the run must succeed."""

    def run(logs, *flags, skip=30, models=digits_models[:1]):
        command = ("--model_path", *models, "--logs_dir", logs, "--skip", skip, *FLAGS, *flags)
        code, _, err = script("0Gaussian/certify_mhead.py", *command)
        assert code == 0, err
        (log,) = [path for path in (tmp_path / logs).rglob("*.log") if "ACR" not in path.name]
        return log

    return run


def beside(log, ending):
    return log.with_name(log.name.removesuffix(".log") + ending)


def without_time(log):
    return [line.rsplit("\t", 1)[0] for line in log.read_text().splitlines()]


# --- killed at any moment ---


def _run_in_child(folder, command, rank, world, port):
    """A process's whole life: certify as one of `world` processes, without pytest's output."""
    os.chdir(folder)
    os.setsid()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for good
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = command
    sys.path.insert(0, str(CODES))
    runpy.run_path(command[0], run_name="__main__")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_20_times_ends_with_the_uninterrupted_log(certify, digits_models, tmp_path, world):
    """SIGKILL at random moments, all processes at once; forked children spare the import of torch each time."""
    flags = ("--skip", 6, "--N0", 20, "--N", 2500, "--device", "cpu", "--batch_size", 500, "--logs_dir", "killed")
    command = [str(part) for part in (CODES / "certify_mhead.py", "--model_path", digits_models[0], *flags)]
    fork, kills, draw = multiprocessing.get_context("fork"), 0, random.Random(world)
    finished = False
    while not finished:
        port = free_port()
        children = [
            fork.Process(target=_run_in_child, args=(tmp_path, command, rank, world, port)) for rank in range(world)
        ]
        for child in children:
            child.start()
        if kills < 20:
            time.sleep(draw.uniform(0.05, 0.45))
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
            kills += 1
        for child in children:
            child.join(60)
        finished = all(child.exitcode == 0 for child in children)
        assert finished or (kills <= 20 and all(child.exitcode in (0, 1, -signal.SIGKILL) for child in children))
    assert kills == 20
    (killed,) = [path for path in (tmp_path / "killed").rglob("*.log") if "ACR" not in path.name]
    whole = certify("whole", "--N", 2500, "--batch_size", 500, skip=6)
    assert without_time(killed) == without_time(whole) and len(read_log(killed)) == 60
    counts = [beside(log, "-counts.jsonl") for log in (killed, whole)]
    tallies = [[(one.idx, one.estimation.tolist()) for one in read_votes(path)] for path in counts]
    assert tallies[0] == tallies[1]
    assert not list(killed.parent.glob("*-part-*"))


def torchrun(folder, script, *flags, processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        processes,
        "--master_port",
        free_port(),
    ]
    command = [str(part) for part in (*command, CODES / script, *flags)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_torchrun_certifies_as_one_process_does(certify, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], "--logs_dir", "two", "--skip", 30, *FLAGS)
    result = torchrun(tmp_path, "0Gaussian/certify_mhead.py", *flags)
    assert result.returncode == 0, result.stderr
    (two,) = [path for path in (tmp_path / "two").rglob("*.log") if "ACR" not in path.name]
    assert without_time(two) == without_time(certify("one"))
    assert not list(two.parent.glob("*-part-*")) and result.stdout.count("ACR") == 1


def test_torchrun_trains_as_one_process_does(script, tmp_path):
    """Half a batch each, BatchNorm statistics of half a batch: the losses stay close, and only one process writes."""
    flags = (*TINY, "--num_heads", 2, "--epochs", 4, "--batch_size", 128)
    result = torchrun(tmp_path, "0Gaussian/train.py", *flags, "--save_dir", "two", "--logs_dir", "two-logs")
    assert result.returncode == 0, result.stderr
    assert script("0Gaussian/train.py", *flags)[0] == 0
    two, one = (pd.read_csv(next((tmp_path / name).rglob("*-train.log")), sep="\t") for name in ("two-logs", "logs"))
    assert two["epoch"].tolist() == [1, 2, 3, 4] and result.stdout.count("epoch 4/4") == 1
    assert (two["ce"] - one["ce"]).abs().max() < 0.15 * one["ce"].max()
    assert two["ce"].iloc[-1] < 0.6 * two["ce"].iloc[0]
    contents = torch.load(next((tmp_path / "two").rglob("epoch4.pth")), weights_only=True)
    assert not any("module" in key for key in contents["state_dict"]) and len(contents["rng"]) == 2


# --- shards and other levels ---


def test_shards_merge_into_the_log_of_one_run(certify, script, tmp_path):
    whole = certify("whole", skip=40)
    shards = [certify(f"shard{i}", "--shard", f"{i}/3", skip=40) for i in (1, 2, 3)]
    assert [len(read_log(shard)) for shard in shards] == [3, 3, 3]
    code, _, err = script("merge_logs.py", *shards)
    assert code == 0, err
    merged = shards[0].with_name(whole.name)
    assert without_time(merged) == without_time(whole)
    assert beside(merged, "-ACR.log").read_text() == beside(whole, "-ACR.log").read_text()


def test_shards_that_do_not_make_one_run_are_refused(certify, script):
    shards = [certify(f"shard{i}", "--shard", f"{i}/3", skip=40) for i in (1, 2)]
    other = certify("other", "--shard", "3/3", "--seed", 5, skip=40)
    overlapping = certify("overlap", "--shard", "1/2", skip=40)
    for logs, message in (
        (shards, "3 of 9 images are in no shard's log, first idx 80"),
        ([*shards, other], "different configurations: seed (0 there, 5 here)"),
        ([*shards, overlapping], "idx 0 is in"),
        ([certify("whole", skip=40)], "not the logs of shards"),
    ):
        code, _, err = script("merge_logs.py", *logs)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not shards[0].with_name("h-3-eps-0.8-m-2-lbdlast-1.2-certify-skip-40.log").exists()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_is_one_of_its_number(script, digits_models, shard):
    code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", digits_models[0], "--shard", shard)
    assert code == 2 and f"'{shard}' must be I/N with 1 <= I <= N" in err


def test_another_alpha_needs_no_network(certify, script):
    log, other = certify("a"), certify("b", "--alpha", 0.05)
    code, _, err = script("relog.py", log, "--alpha", 0.05)
    assert code == 0, err
    assert without_time(beside(log, "-alpha-0.05.log")) == without_time(other)
    code, _, err = script("relog.py", log, "--alpha", 0.05)
    assert code == 2 and "--overwrite replaces it" in err
    code, _, err = script("relog.py", log, "--alpha", 1e-70)
    assert code == 2 and "can never certify" in err


def test_one_head_alone_from_the_network_or_from_the_counts(certify, script):
    log, alone = certify("a"), certify("b", "--head", 1)
    assert "-head-1-" in alone.name
    assert script("relog.py", log, "--head", 1)[0] == 0
    assert without_time(next(log.parent.glob("*-alpha-0.001-head-1.log"))) == without_time(alone)
    assert without_time(alone) != without_time(log)
    code, out, _ = script("report.py", log, "--heads")
    assert code == 0 and out.count("| head ") == 3 and f"{average_certified_radius(read_log(alone)):.3f}" in out


def test_a_head_that_is_not_there_is_refused(script, digits_models):
    code, _, err = script(
        "0Gaussian/certify_mhead.py", "--model_path", digits_models[0], "--head", 3, "--device", "cpu"
    )
    assert code == 2 and "--head 3: the classifier's heads are 0..2" in err


# --- several checkpoints ---


def test_an_ensemble_sums_the_logits_of_its_networks(certify, digits_models):
    log = certify("a", "--max", 60, models=[*digits_models, digits_models[1]])
    assert log.name.startswith("h-3-eps-0.8-m-2-lbdlast-1.2+h-1-eps-0.8-m-2-lbdlast-1.2x2-certify")
    assert read_votes(beside(log, "-counts.jsonl"))[0].estimation.shape == (3 + 1 + 1 + 1, 10)
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["num_heads"] == [3, 1, 1] and len(config["checkpoint_sha256"]) == 3
    twice = certify("b", "--max", 60, models=[digits_models[1]] * 2)
    once = certify("c", "--max", 60, models=[digits_models[1]])
    assert without_time(twice) == without_time(once)  # twice the same logits choose the same class


def test_checkpoints_of_different_sigma_do_not_make_an_ensemble(script, digits_models, tmp_path):
    contents = torch.load(digits_models[1], weights_only=True)
    contents["args"]["noise_sd"] = 0.25
    torch.save(contents, tmp_path / "other.pth")
    code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", digits_models[0], tmp_path / "other.pth")
    assert code == 2 and "the checkpoints' noise_sd differ: 0.25, 0.5" in err


# --- stopping early ---


def test_sequential_runs_draw_less_and_claim_what_their_counts_allow(certify):
    fixed = certify("fixed", "--N", 5000, "--batch_size", 1000)
    log = certify("sequential", "--N", 5000, "--batch_size", 1000, "--sequential")
    votes = read_votes(beside(log, "-counts.jsonl"))
    used = [int(one.estimation[-1].sum()) for one in votes]
    assert max(used) <= 5000 and sum(used) < 5000 * len(used) / 2
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["sequential"]["radii"] == [0, 0.25, 0.5, 0.75, 1.0, 1.25]
    for one, row in zip(votes, read_log(log).itertuples(), strict=True):
        if row.predict >= 0:
            p_lower = anytime_lower_bound(int(one.estimation[-1][row.predict]), int(one.estimation[-1].sum()), 0.001)
            assert row.radius == pytest.approx(0.5 * stats.norm.ppf(p_lower), rel=1e-5)
    both = read_log(fixed).merge(read_log(log), on="idx")
    assert (both["predict_x"] == both["predict_y"]).all()
    certified = [(both[f"correct_{run}"] * both[f"radius_{run}"] >= 0.25).mean() for run in "xy"]
    assert abs(certified[0] - certified[1]) <= 1 / 12 + 1e-9


@pytest.mark.parametrize("flags", [("--radii", 0.25), ("--tolerance", 0.2)])
def test_the_stopping_rule_is_the_users(certify, flags):
    log = certify("a", "--N", 5000, "--sequential", *flags, "--max", 100)
    stopping = json.loads(beside(log, ".json").read_text())["config"]["sequential"]
    assert stopping == {"radii": [0.25], "give_up": 0.01} or stopping == {"tolerance": 0.2}
    assert any(int(one.estimation[-1].sum()) < 5000 for one in read_votes(beside(log, "-counts.jsonl")))


def test_stopping_rules_need_sequential_and_exclude_each_other(script, digits_models):
    for flags, message in (
        (("--radii", 0.5), "it needs --sequential"),
        (("--sequential", "--radii", 0.5, "--tolerance", 0.1), "give one of them"),
    ):
        code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", digits_models[0], *flags)
        assert code == 2 and message in err


def test_skip_wrong_draws_nothing_for_a_wrong_class(certify, script):
    plain, log = certify("a", "--max", 100, skip=3), certify("b", "--max", 100, "--skip_wrong", skip=3)
    rows, votes = read_log(log), read_votes(beside(log, "-counts.jsonl"))
    skipped = [one.idx for one in votes if int(one.estimation.sum()) == 0]
    assert skipped == [one.idx for one in votes if int(one.selection[-1].argmax()) != one.label] and skipped
    assert (rows[rows["idx"].isin(skipped)][["radius", "correct"]] == 0).all(axis=None)
    assert average_certified_radius(rows) == average_certified_radius(read_log(plain))
    code, _, err = script("report.py", log, "--heads")
    assert code == 2 and "--skip_wrong" in err


# --- prediction, attack, exact noise ---


def test_prediction_logs(script, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], "--skip", 10, "--N", 200, "--device", "cpu")
    code, out, err = script("0Gaussian/predict_mhead.py", *flags)
    assert code == 0, err
    (path,) = (tmp_path / "logs/digits/R8/noise-0.50/predict-mhead").glob("*.log")
    log = pd.read_csv(path, sep="\t")
    assert list(log) == ["idx", "label", "predict", "correct", "time"] and log["idx"].tolist() == list(
        range(0, 360, 10)
    )
    assert log["correct"].mean() > 0.5 and (log[log["predict"] == -1]["correct"] == 0).all()
    assert f"accuracy {log['correct'].mean():.3f}" in out


def test_no_attack_breaks_a_certificate(certify, script, digits_models, tmp_path):
    """Each certificate errs with probability at most 0.001: of at most 72 tests, 5 wrong ones have P < 1e-8."""
    log = certify("logs", "--N", 1000, "--batch_size", 1000, skip=10)
    flags = ("--model_path", digits_models[0], "--log", log, "--radii", 0.2, 0.5, "--N", 500, "--num_steps", 8)
    code, out, err = script("0Gaussian/attack_mhead.py", *flags, "--device", "cpu")
    assert code == 0, err
    table = pd.read_csv(next(tmp_path.rglob("*-attack.log")), sep="\t")
    assert len(table) == 72 and stats.binom.sf(4, 72, 0.001) < 1e-7
    assert table["broken"].sum() < 5
    empirical = table.groupby("attack_radius")["correct"].mean()
    certified = [(read_log(log)["radius"] * read_log(log)["correct"] >= radius).mean() for radius in (0.2, 0.5)]
    assert empirical[0.2] > empirical[0.5] and all(empirical >= certified)
    assert empirical[0.5] < read_log(log)["correct"].mean()  # the attack does something
    assert "empirical accuracy" in out


def test_an_attack_on_other_images_is_refused(script, digits_models, tmp_path):
    log = tmp_path / "other.log"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.5\t1\t0:00:01\n")
    code, _, err = script(
        "0Gaussian/attack_mhead.py", "--model_path", digits_models[0], "--log", log, "--radii", 1, "--device", "cpu"
    )
    assert code == 2 and "its idx 0 has label 3" in err


def test_exact_noise_certifies_like_ordinary_noise(certify):
    """36 images at N 1000: the ACRs differ by votes alone, the paired difference stays within 6 standard errors."""
    plain = read_log(certify("plain", "--N", 1000, "--batch_size", 1000, skip=10))
    log = certify("exact", "--N", 1000, "--batch_size", 1000, "--exact_noise", skip=10)
    exact = read_log(log)
    difference = plain["correct"] * plain["radius"] - exact["correct"] * exact["radius"]
    assert abs(difference.mean()) < 6 * difference.std() / 6
    assert average_certified_radius(exact) > 0.1
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["exact_noise"] and 0 < config["noise_slack"] < 1e-6
    assert config["arithmetic"]["cudnn_allow_tf32"] is False and config["precision"] == "fp32"
