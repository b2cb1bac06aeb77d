"""Runs that are killed, divided, merged and made again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from children import Children, free_port, is_running, run, wait_for
from conftest import CODES, RUN_FLAGS, TINY, beside, without_time

from spacte import distributed
from spacte.logs.certlog import read_log
from spacte.logs.counts import read_counts
from spacte.logs.runfiles import RunFiles
from spacte.model import pass_size
from spacte.utils import RunError

# --- killed at any moment ---


def disagreed(log):
    """What the run's JSON says of its consensus."""
    return json.loads(beside(log, ".json").read_text())["about"].get("consensus")


@pytest.mark.parametrize(("world", "more"), [(1, ()), (2, ("--consensus", 2, "--precision", "int8"))])
def test_a_run_killed_again_and_again_ends_with_the_uninterrupted_log(certify, digits_models, tmp_path, world, more):
    """SIGKILL twice, all processes at once, at a random moment after an image's votes have come to the disk.

    Another number of processes counts the rest.
    """
    flags = ("--model_path", digits_models[0], "--skip", 9, "--N0", 20, "--N", 1000, "--device", "cpu")
    flags = ("0Gaussian/certify_mhead.py", *flags, "--batch_size", 250, "--logs_dir", "killed", *more)
    draw = random.Random(world)

    def written():
        return sum(path.stat().st_size for path in (tmp_path / "killed").rglob("*.jsonl"))

    for _ in range(2):
        with Children(tmp_path, *flags, world=world) as children:
            before = written()
            wait_for(lambda before=before: written() > before, 300)
            time.sleep(draw.uniform(0, 0.02))
            children.kill()
            assert children.exit_codes() == [-signal.SIGKILL] * world
    with Children(tmp_path, *flags, world=3 - world) as children:
        assert children.exit_codes() == [0] * (3 - world)
    (killed,) = [path for path in (tmp_path / "killed").rglob("*.log") if "ACR" not in path.name]
    whole = certify("whole", "--N", 1000, "--batch_size", 250, *more, skip=9)
    assert without_time(killed) == without_time(whole) and len(read_log(killed)) == 40
    counts = [beside(log, "-counts.jsonl") for log in (killed, whole)]
    tallies = [[(one.idx, one.estimation.tolist()) for one in read_counts(path)] for path in counts]
    assert tallies[0] == tallies[1] and disagreed(killed) == disagreed(whole)
    assert not list(killed.parent.glob("*-part-*"))


def torchrun(script, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    return [str(part) for part in (*command, "--", CODES / script, *flags)]


def test_torchrun_certifies_as_one_process_does(certify, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], "--logs_dir", "two", "--skip", 30, "--max", 359, *RUN_FLAGS)
    result = run(torchrun("0Gaussian/certify_mhead.py", *flags), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (two,) = [path for path in (tmp_path / "two").rglob("*.log") if "ACR" not in path.name]
    assert without_time(two) == without_time(certify("one"))
    assert not list(two.parent.glob("*-part-*")) and result.stdout.count("ACR") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes do not end with their parents")
def test_processes_end_with_a_torchrun_that_is_killed(digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], "--N", 5000, "--device", "cpu")
    with subprocess.Popen(
        torchrun("0Gaussian/certify_mhead.py", *flags), cwd=tmp_path, start_new_session=True
    ) as agent:
        try:
            wait_for(lambda: len(list(tmp_path.rglob("*-part-*.jsonl"))) == 2, 300)
            workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        finally:
            agent.kill()
    assert len(workers) == 2
    try:
        wait_for(lambda: not any(map(is_running, map(int, workers))), 10)
    except AssertionError:
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        raise


def test_processes_whose_torchrun_is_gone_do_not_wait_for_it(monkeypatch):
    gone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in gone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(distributed, "end_with_parent", lambda: None)
    with pytest.raises(RunError, match=r"^torchrun does not answer: .*"):
        distributed.init_distributed()


def test_two_processes_attack_as_one_does(certify, script, digits_models, tmp_path):
    log = certify("logs", "--max", 150)
    flags = ("--model_path", digits_models[0], "--log", log, "--radii", 0.3, "--N", 200, "--num_steps", 4)
    flags = ("0Gaussian/attack_mhead.py", *flags, "--device", "cpu", "--logs_dir")
    with Children(tmp_path, *flags, "two", world=2) as children:
        assert children.exit_codes() == [0, 0]
    assert script(*flags, "one")[0] == 0
    two, one = (next((tmp_path / folder).rglob("*-attack.log")) for folder in ("two", "one"))
    assert without_time(two) == without_time(one) and len(without_time(one)) == 6


def test_two_processes_train_as_one_does(script, tmp_path):
    """Half a batch each, BatchNorm statistics of half a batch: the losses stay close, and only one process writes."""
    flags = (*TINY, "--num_heads", 2, "--epochs", 4, "--batch_size", 128)
    together = ("0Gaussian/train.py", *flags, "--save_freq", 2, "--save_dir", "two", "--logs_dir", "two-logs")
    printed = tmp_path / "printed.txt"
    with Children(tmp_path, *together, world=2, output=printed) as children:
        assert children.exit_codes() == [0, 0], printed.read_text()
    assert script("0Gaussian/train.py", *flags)[0] == 0
    two, one = (pd.read_csv(next((tmp_path / name).rglob("*-train.log")), sep="\t") for name in ("two-logs", "logs"))
    assert two["epoch"].tolist() == [1, 2, 3, 4] and printed.read_text().count("epoch 4/4") == 1
    assert (two["ce"] - one["ce"]).abs().max() < 0.15 * one["ce"].max()
    assert two["ce"].iloc[-1] < 0.6 * two["ce"].iloc[0]
    contents = torch.load(next((tmp_path / "two").rglob("epoch4.pth")), weights_only=True)
    assert not any("module" in key for key in contents["state_dict"]) and len(contents["rng"]) == 2

    next((tmp_path / "two").rglob("epoch4.pth")).unlink()  # as if it had been killed in between
    with Children(tmp_path, *together, "--resume", world=2) as children:
        assert children.exit_codes() == [0, 0]
    again = torch.load(next((tmp_path / "two").rglob("epoch4.pth")), weights_only=True)
    assert all(torch.equal(value, again["state_dict"][key]) for key, value in contents["state_dict"].items())


def test_two_processes_take_the_step_of_one(script, tmp_path):
    """What averaging their gradients gives, where no layer depends on the batch and the noise is next to nothing."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 28, 28), dtype=np.uint8), np.arange(64) % 10
    np.savez(tmp_path / "MNIST.npz", train=images, train_labels=labels, test=images, test_labels=labels)
    flags = ("--dataset", "MNIST", "--data_dir", ".", "--arch", "LeNet", "--num_heads", 2, "--noise_sd", 1e-6)
    flags += ("--num_noise_vec", 1, "--epochs", 2, "--batch_size", 32, "--device", "cpu")
    flags = ("0Gaussian/train.py", *flags)
    with Children(tmp_path, *flags, "--save_dir", "two", "--logs_dir", "two-logs", world=2) as children:
        assert children.exit_codes() == [0, 0]
    assert script(*flags)[0] == 0
    two, one = (
        torch.load(next((tmp_path / name).rglob("epoch2.pth")), weights_only=True)["state_dict"]
        for name in ("two", "save")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)


# --- shards and other levels ---


def test_shards_merge_into_the_log_of_one_run(certify, script, tmp_path):
    whole = certify("whole", skip=40)
    shards = [certify(f"shard{i}", "--shard", f"{i}/3", skip=40) for i in (1, 2, 3)]
    assert [len(read_log(shard)) for shard in shards] == [3, 3, 3]
    code, _, err = script("merge_logs.py", *shards)
    assert (code, err) == (0, "")
    merged = shards[0].with_name(whole.name)
    assert without_time(merged) == without_time(whole)
    assert beside(merged, "-ACR.log").read_text() == beside(whole, "-ACR.log").read_text()


def test_merging_says_where_shards_were_made_otherwise(certify, script):
    shards = [certify(f"shard{i}", "--shard", f"{i}/3", "--images_per_pass", 5 * i, skip=40) for i in (1, 2, 3)]
    files = [RunFiles(shard) for shard in shards]
    earlier = {"device": "NVIDIA H100", "images_per_pass": 10, "rows": 1}  # before it was resumed
    files[0].note("earlier", [earlier])
    code, _, err = script("merge_logs.py", *shards)
    passes, devices = sorted(err.splitlines())[::-1]
    assert code == 0 and "different numbers of images per pass (10: 1, 2; 15: 3; 5: 1): near ties may be" in passes
    assert "the shards ran with different devices (NVIDIA H100: 1; cpu: 1, 2, 3)" in devices


def test_what_a_consensus_disagreed_on_is_of_all_sessions_and_all_shards(certify, script, digits_models):
    flags = ("--consensus", 2)
    whole, seen = certify("whole", *flags), 12 * 220
    expected = disagreed(whole)
    assert expected["seen"] == seen and 0 < expected["share"] == expected["disagreed"] / seen < 1
    first = certify("resumed", *flags, "--max", 100)
    assert disagreed(first)["seen"] == 4 * 220
    command = ("--model_path", digits_models[0], "--logs_dir", "resumed", "--skip", 30, *RUN_FLAGS, *flags)
    share = f"the first 2 disagreed on {100 * expected['share']:.1f} % of the 2640 noisy copies\n"
    for _ in ("resumed", "finished"):
        assert script("0Gaussian/certify_mhead.py", *command)[1].endswith(share) and disagreed(first) == expected
    shards = [certify(f"shard{i}", *flags, "--shard", f"{i}/2") for i in (1, 2)]
    assert sum(disagreed(shard)["disagreed"] for shard in shards) == expected["disagreed"]
    assert script("merge_logs.py", *shards)[0] == 0
    merged = shards[0].with_name(whole.name)
    assert disagreed(merged) == expected and script("relog.py", merged, "--alpha", 0.05)[0] == 0
    assert disagreed(merged.with_name(f"{merged.stem}-alpha-0.05.log")) == expected


def test_logs_are_merged_and_made_again_where_no_torch_is_installed(certify, tmp_path):
    shards = [certify(f"shard{i}", "--shard", f"{i}/2", skip=90) for i in (1, 2)]
    without = (
        "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    )
    merged = shards[0].with_name(shards[0].name.replace("-shard-1-of-2", ""))
    for command in (("merge_logs.py", *shards), ("relog.py", merged, "--alpha", 0.05)):
        environment = os.environ | {"PYTHONPATH": str(CODES)}
        result = run([sys.executable, "-c", without, CODES / command[0], *command[1:]], env=environment)
        assert result.returncode == 0, result.stderr
    assert len(read_log(merged.with_name(f"{merged.stem}-alpha-0.05.log"))) == len(read_log(merged)) == 4


def test_shards_that_do_not_make_one_run_are_refused(certify, script):
    shards = [certify(f"shard{i}", "--shard", f"{i}/3", skip=40) for i in (1, 2)]
    other = certify("other", "--shard", "3/3", "--seed", 5, skip=40)
    overlapping = certify("overlap", "--shard", "1/2", skip=40)
    for logs, message in (
        (shards, "shard 3/3 is missing"),
        ([*shards, shards[0]], "shard 1/3 is there twice"),
        ([*shards, other], "different configurations: seed (0 there, 5 here)"),
        ([*shards, overlapping], "shards of 3 and of 2 do not make one run"),
        ([certify("whole", skip=40)], "not the logs of shards"),
    ):
        code, _, err = script("merge_logs.py", *logs)
        assert code == 2 and message in err and err.count("\n") == 1
    third = certify("shard3", "--shard", "3/3", skip=40)
    for path in (third, beside(third, "-counts.jsonl")):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    code, _, err = script("merge_logs.py", *shards, third)
    assert code == 2 and "3-of-3.log' is not whole: it holds 2 of 3 images" in err
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


def test_a_run_keeps_the_pass_that_it_was_begun_with(script, trained, monkeypatch):
    """On resume, in its shards and where the JSON is older; another run, or one started from scratch, measures."""

    def noted(logs, *flags):
        flags = ("--model_path", trained, *RUN_FLAGS, "--skip", 30, *flags, "--logs_dir", logs)
        code, _, err = script("certify_mhead.py", *flags)
        assert code == 0, err
        return {json.loads(path.read_text())["about"]["images_per_pass"] for path in Path(logs).rglob("*.json")}

    sizes = iter(range(40, 50))
    monkeypatch.setattr(pass_size, "fastest_pass_size", lambda network, image: next(sizes))
    assert noted("a", "--max", 90) == {40} == noted("a") == noted("a")
    assert noted("a", "--overwrite") == {41}
    assert noted("b", "--shard", "2/2") == {42} == noted("b", "--shard", "1/2")
    assert noted("c", "--max", 90) == {43}
    (path,) = Path("c").rglob("*.json")
    content = json.loads(path.read_text())
    del content["about"]["images_per_pass"]
    path.write_text(json.dumps(content))
    assert noted("c") == {100}, "all of a batch of digits, as it was then"
    assert noted("d", "--images_per_pass", 25, "--max", 90) == {25} == noted("d")
    assert noted("e", "--images_per_pass", 25, "--max", 90) == {25}
    (path,) = Path("e").rglob("*.json")
    content = json.loads(path.read_text())
    content["about"]["device"] = "a GPU"
    path.write_text(json.dumps(content))
    assert noted("e") == {44}, "a GPU's passes are as large as a batch"
