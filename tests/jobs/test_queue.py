"""A queue of runs: mostly with stand-ins for train.py and certify_mhead.py, and once with the real ones."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from children import is_running, run, wait_for
from stand_ins import JOBS, QUEUE, epochs, said

from spacte.jobs.queue import Running

# --- a queue that runs through ---


def test_each_seed_of_every_run_is_worked_off_before_the_next_seed_and_ensembles_last(queue):
    code, out, err = queue(QUEUE)
    assert (code, err) == (0, "")
    assert said(out, "started") == said(out, "finished") == JOBS
    assert out.endswith("5 of 5 jobs finished, 0 failed\n")


def test_runs_can_be_worked_off_one_after_the_other(queue):
    out = queue(QUEUE, "--order", "runs", "--commands")[1]
    assert re.findall(r"--job (\S+)$", out, re.MULTILINE) == [
        "0Stub/five/seed-1",
        "0Stub/five/seed-2",
        "1Stub/one/seed-1",
        "1Stub/one/seed-2",
        "1Stub/both",
    ]


def test_the_last_checkpoints_are_certified_and_kept(queue, work):
    queue(QUEUE, "--processes", 3)
    (summary,) = (work / "1Stub/both/logs").rglob("*-ACR.log")
    assert summary.read_text() == "epoch3.pth 1\nepoch3.pth 2\n"
    assert epochs(work) == ["epoch3.pth"] * 4


def test_an_entry_can_be_several_ensembles(queue, work):
    several = QUEUE + "seeds = [[2, 1], [2]]\n"
    assert said(queue(several)[1], "finished")[4:] == ["1Stub/both/seeds-2-1", "1Stub/both/seeds-2"]
    found = {path.relative_to(work).parts[2]: path.read_text() for path in (work / "1Stub/both").rglob("*-ACR.log")}
    assert found == {"seeds-2-1": "epoch3.pth 2\nepoch3.pth 1\n", "seeds-2": "epoch3.pth 2\n"}


def test_what_is_finished_is_not_begun_again(queue, work):
    queue(QUEUE)
    code, out, _ = queue(QUEUE)
    assert code == 0 and out.startswith("5 jobs, 5 of them finished") and not said(out, "started")
    note = work / "1Stub/both/job.json"
    took = json.loads(note.read_text())["seconds"]
    note.write_text(note.read_text().replace('"finished": true', '"finished": false'))
    assert said(queue(QUEUE)[1], "finished") == ["1Stub/both"] and json.loads(note.read_text())["seconds"] == took > 0


def test_a_pilot_is_only_trained(queue, work):
    code, out, _ = queue(QUEUE.replace('label = "one"', 'label = "one"\ncertify = false'), "--processes", 4)
    assert code == 0 and said(out, "started") == JOBS
    assert not list((work / "1Stub/one").rglob("*-ACR.log")) and list((work / "1Stub/both").rglob("*-ACR.log"))


def test_the_output_of_every_command_is_kept(queue, work):
    queue(QUEUE)
    output = (work / "0Stub/five/seed-2/output.txt").read_text()
    assert re.findall(r" (\w+\.py) ", output) == ["train.py", "certify_mhead.py"]
    assert "epoch 3/3  0:00:01 left\n" in output and "--num_heads 5 --seed 2" in output


def test_the_list_says_how_each_job_stands_and_runs_nothing(queue, work):
    waiting = queue(QUEUE, "--list")[1]
    assert waiting.splitlines() == [f"{job:17}  waiting" for job in JOBS] and not work.exists()
    queue(QUEUE)
    shutil.rmtree(work / "1Stub/one/seed-1/logs")
    states = [line.split(maxsplit=1)[1] for line in queue(QUEUE, "--list")[1].splitlines()]
    assert states == ["finished", "begun, at epoch 3", "finished", "finished", "finished"]


def test_the_lines_of_commands_are_the_jobs(queue, work):
    """As a cluster runs them: the ensemble in the end; the queue then finds all of it finished."""
    lines = queue(QUEUE, "--commands")[1].splitlines()
    assert run(["sh", "-c", lines[-1]], cwd="/").stderr.endswith("needs 1Stub/one/seed-1, which is not finished\n")
    for line in lines:
        assert run(["sh", "-c", line], cwd="/").returncode == 0
    assert len(lines) == 5 and "started" not in queue(QUEUE)[1]
    (summary,) = (work / "1Stub/both/logs").rglob("*-ACR.log")
    assert summary.read_text() == "epoch3.pth 1\nepoch3.pth 2\n"


def test_work_in_a_flag_is_the_work_folder(queue, work):
    """In what is run; the job's settings stay those of the file."""
    text = QUEUE.replace('"--epochs 3"', '"--epochs 3 --votes_dir WORK/votes --model=WORK/a"')
    assert queue(text.replace('"--N 100"', '"--N 100 --data_dir WORK/data"'))[0] == 0
    output = (work / "0Stub/five/seed-1/output.txt").read_text()
    assert f"--votes_dir '{work}/votes' '--model={work}/a'" in output and f"--data_dir '{work}/data'" in output
    settings = json.loads((work / "0Stub/five/seed-1/job.json").read_text())["train"]
    assert settings["--votes_dir"] == ["WORK/votes"]


def test_a_job_without_a_name_is_no_whole_queue(queue, work):
    """A scheduler's script whose variable is not set."""
    code, _, err = queue(QUEUE, "--job", "")
    assert code == 2 and "--job '' must be one of 0Stub/five/seed-1, " in err and not work.exists()


def test_a_running_jobs_folder_may_vanish(tmp_path):
    """Its queue only cannot tell how long it will take."""
    one = object.__new__(Running)
    one.output = tmp_path / "gone" / "output.txt"
    assert one.seconds_left() is None


# --- what fails ---

FAILING = QUEUE.replace('defence = "1Stub"', 'defence = "1Stub"\ntrain = "--fail"')


def test_a_failing_job_is_reported_and_the_others_go_on(queue):
    code, out, _ = queue(FAILING)
    assert code == 1 and said(out, "finished") == ["0Stub/five/seed-1", "0Stub/five/seed-2"]
    assert "failed   1Stub/one/seed-1: train.py ended with exit code 1: train.py: error: --fail was given\n" in out
    assert "failed   1Stub/both: it needs 1Stub/one/seed-1, which has failed\n" in out
    assert "2 of 5 jobs finished, 3 failed" in out


def test_the_list_says_why_a_job_failed(queue):
    queue(FAILING)
    assert queue(FAILING, "--list")[1].count("failed: train.py ended with exit code 1") == 2


def test_a_folder_that_cannot_be_written_ends_its_job_alone(queue, work):
    (work / "0Stub").mkdir(parents=True)
    (work / "0Stub/five").write_text("a file where a folder should be")
    code, out, _ = queue(QUEUE)
    assert code == 1 and said(out, "failed") == ["0Stub/five/seed-1", "0Stub/five/seed-2"]
    assert f"cannot write to '{work}/0Stub/five/seed-1': Not a directory" in out and "3 of 5 jobs finished" in out


def test_a_failed_job_is_tried_again_with_flags_that_are_mended(queue):
    queue(FAILING)
    code, out, _ = queue(QUEUE)
    assert code == 0 and "5 of 5 jobs finished, 0 failed" in out


# --- interruptions ---


@pytest.mark.parametrize(
    ("number", "code", "last"),
    [(signal.SIGINT, 130, "interrupted; the files on disk are complete"), (signal.SIGTERM, 130, "interrupted;")]
    + [(signal.SIGKILL, -9, "")] * (sys.platform == "linux"),
)
def test_an_interrupted_queue_leaves_nothing_running_and_goes_on(queue, stub, tmp_path, work, number, code, last):
    longer = QUEUE.replace("--epochs 3", "--epochs 6")
    queue(longer, "--list")
    holds = [stub.parent / defence / "hold" for defence in ("0Stub", "1Stub")]
    for hold in holds:
        hold.touch()  # no fourth epoch while it is there
    command = [sys.executable, stub, "queue.toml", "--work", work, "--processes", "2"]
    child = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    saves = [work / job / "save" for job in JOBS[:2]]
    wait_for(lambda: all(epochs(save) == ["epoch2.pth", "epoch3.pth"] for save in saves))
    pids = [int((save / "pid").read_text()) for save in saves]
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [19, 19]
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code and last in err and err.count("\n") <= 1
    wait_for(lambda: not any(map(is_running, pids)))
    for hold in holds:
        hold.unlink()
    code, out, _ = queue(longer)
    assert code == 0 and "5 of 5 jobs finished, 0 failed" in out
    (log,) = (work / JOBS[0] / "logs").rglob("run-train.log")
    assert log.read_text().split() == ["1", "2", "3", "4", "5", "6"]


def test_two_queues_do_not_work_in_one_folder(queue, work):
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = queue(QUEUE)
    assert (
        code == 75 and err.count("\n") == 1 and "another queue, or a command that one started, is still at work" in err
    )


def test_jobs_alone_share_the_folder_but_not_a_job(queue, work):
    (work / JOBS[0]).mkdir(parents=True)
    with open(work / "lock", "w") as shared, open(work / JOBS[0] / "lock", "w") as own:
        fcntl.flock(shared, fcntl.LOCK_SH)
        fcntl.flock(own, fcntl.LOCK_EX)
        assert queue(QUEUE, "--job", JOBS[1])[0] == 0
        code, _, err = queue(QUEUE, "--job", JOBS[0])
        assert code == 75 and err.endswith(f"another process is at work on {JOBS[0]}\n")
        assert queue(QUEUE)[0] == 75, "the whole queue"
    code, _, err = queue(QUEUE, "--job", "0Stub/six")
    assert code == 2 and f"--job '0Stub/six' must be one of {', '.join(JOBS)}" in err


def test_a_job_of_slurm_that_an_earlier_run_still_holds_goes_back_into_its_queue(queue, work, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> '{tmp_path}/asked'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "1"), ("JOB_ID", "9")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    (work / JOBS[0]).mkdir(parents=True)
    with open(work / JOBS[0] / "lock", "w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        code, out, err = queue(QUEUE, "--requeue", "--job", JOBS[0])
    assert (code, err) == (0, "") and (tmp_path / "asked").read_text() == "requeue 7_1\n"
    assert out == f"{JOBS[0]} goes back into SLURM's queue as 7_1: another process is at work on {JOBS[0]}\n"
    code, _, err = queue(QUEUE, "--requeue", "--job", JOBS[-1])
    assert code == 75 and "needs 1Stub/one/seed-1" in err, "waiting for what may have failed would never end"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    monkeypatch.delenv("SLURM_JOB_ID")
    for flags, line in ((("--job", JOBS[0]), "this is none"), ((), "--requeue needs --job (see --help)")):
        code, _, err = queue(QUEUE, "--requeue", *flags)
        assert code == 2 and err.count("\n") == 1 and err.endswith(f"{line}\n")


def test_a_command_that_outlives_its_queue_holds_the_folder(queue, work, stub):
    """Where the system does not end it with the queue; as Running starts it, with the lock handed down."""
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),))
    try:
        assert queue(QUEUE)[0] == 75
    finally:
        orphan.kill()
        orphan.wait()
    assert queue(QUEUE)[0] == 0


# --- the real programs ---


def test_a_real_queue_ends_with_a_table(script, tmp_path, quick_queues):
    (tmp_path / "queue.toml").write_text("""
        [defaults]
        seeds = [1, 2]
        train = "--dataset digits --arch R8 --noise_sd 0.5 --batch_size 256 --epochs 1 --num_heads 1 --device cpu"
        certify = "--N 100 --N0 10 --skip 60 --device cpu"
        [[run]]
        label = "one-head"
        defence = "0Gaussian"
        certify = false
        [[ensemble]]
        label = "two-networks"
        of = "one-head"
    """)
    flags = ("queue.toml", "--work", "work", "--processes", 2)
    code, out, _ = script("experiments.py", *flags)
    assert code == 0 and "3 of 3 jobs finished, 0 failed" in out
    assert script("experiments.py", *flags, "--collect", "collected")[0] == 0
    code, table, err = script("report.py", "collected", "--format", "csv")
    assert code == 0 and table.count("\n") == 2 and "x2" in table, err
