"""Runs that are killed, divided, merged and made again."""

import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CODES, RUN_FLAGS, TINY, beside, without_time

from spacte.logs.certlog import read_log
from spacte.logs.votes import read_counts

# --- killed at any moment ---


def _run_in_child(folder, command, rank, world, port):
    """A process's whole life: run a script as one of `world` processes, without pytest's output."""
    os.chdir(folder)
    os.setsid()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for good
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent), str(CODES)]
    sys.modules.pop("circular_teaching", None)
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
    tallies = [[(one.idx, one.estimation.tolist()) for one in read_counts(path)] for path in counts]
    assert tallies[0] == tallies[1]
    assert not list(killed.parent.glob("*-part-*"))


def forked(folder, script, *flags):
    """Exit codes of two processes as torchrun starts them, but forked: they need not import torch again."""
    command, port = [str(part) for part in (CODES / script, *flags)], free_port()
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_run_in_child, args=(folder, command, rank, 2, port)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


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
    command = [str(part) for part in (*command, "--", CODES / script, *flags)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_torchrun_certifies_as_one_process_does(certify, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], "--logs_dir", "two", "--skip", 30, "--max", 359, *RUN_FLAGS)
    result = torchrun(tmp_path, "0Gaussian/certify_mhead.py", *flags)
    assert result.returncode == 0, result.stderr
    (two,) = [path for path in (tmp_path / "two").rglob("*.log") if "ACR" not in path.name]
    assert without_time(two) == without_time(certify("one"))
    assert not list(two.parent.glob("*-part-*")) and result.stdout.count("ACR") == 1


def test_two_processes_attack_as_one_does(certify, script, digits_models, tmp_path):
    log = certify("logs", "--max", 150)
    flags = ("--model_path", digits_models[0], "--log", log, "--radii", 0.3, "--N", 200, "--num_steps", 4)
    assert forked(tmp_path, "0Gaussian/attack_mhead.py", *flags, "--device", "cpu", "--logs_dir", "two") == [0, 0]
    assert script("0Gaussian/attack_mhead.py", *flags, "--device", "cpu", "--logs_dir", "one")[0] == 0
    two, one = (next((tmp_path / folder).rglob("*-attack.log")) for folder in ("two", "one"))
    assert without_time(two) == without_time(one) and len(without_time(one)) == 6


def test_torchrun_trains_as_one_process_does(script, tmp_path):
    """Half a batch each, BatchNorm statistics of half a batch: the losses stay close, and only one process writes."""
    flags = (*TINY, "--num_heads", 2, "--epochs", 4, "--batch_size", 128)
    together = ("0Gaussian/train.py", *flags, "--save_freq", 2, "--save_dir", "two", "--logs_dir", "two-logs")
    result = torchrun(tmp_path, *together)
    assert result.returncode == 0, result.stderr
    assert script("0Gaussian/train.py", *flags)[0] == 0
    two, one = (pd.read_csv(next((tmp_path / name).rglob("*-train.log")), sep="\t") for name in ("two-logs", "logs"))
    assert two["epoch"].tolist() == [1, 2, 3, 4] and result.stdout.count("epoch 4/4") == 1
    assert (two["ce"] - one["ce"]).abs().max() < 0.15 * one["ce"].max()
    assert two["ce"].iloc[-1] < 0.6 * two["ce"].iloc[0]
    contents = torch.load(next((tmp_path / "two").rglob("epoch4.pth")), weights_only=True)
    assert not any("module" in key for key in contents["state_dict"]) and len(contents["rng"]) == 2

    next((tmp_path / "two").rglob("epoch4.pth")).unlink()  # as if it had been killed in between
    assert forked(tmp_path, *together, "--resume") == [0, 0]
    again = torch.load(next((tmp_path / "two").rglob("epoch4.pth")), weights_only=True)
    assert all(torch.equal(value, again["state_dict"][key]) for key, value in contents["state_dict"].items())


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


def test_what_is_unfinished_is_said_so(certify, script):
    log = certify("a")
    for path in (log, beside(log, "-counts.jsonl")):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    code, _, err = script("relog.py", log, "--alpha", 0.05)
    assert code == 0 and "is unfinished: 9 of 12 images" in err and err.count("\n") == 1
    beside(log, "-counts.jsonl").write_text("")
    code, _, err = script("relog.py", log, "--alpha", 0.01)
    assert code == 2 and "holds no votes" in err and not beside(log, "-alpha-0.01.log").exists()
