"""A session of a limited time, on the CPU: what is finished stays, what does not fit or fails is named."""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from children import Children, wait_for
from conftest import CODES

from spacte.files import lock
from spacte.logs.certlog import read_log
from spacte.utils import UserError

SMALL = ("--dataset", "digits", "--arch", "R8", "--num_heads", 2, "--epochs", 3, "--skip", 60, "--N", 300)
SMALL += ("--device", "cpu", "--tiny", "--precision", "fp32", "--speed_seconds", 5)
NAMES = ("2-heads", "1-head")
TRAINED = [f"{step}-{name}" for name in NAMES for step in ("train", "release")]
STEPS = ["tests", "speed", *TRAINED, *(f"certify-{name}" for name in NAMES)]


def is_free(path):
    try:
        with lock(path, "taken"):
            return True
    except UserError:
        return False


def state(output):
    return json.loads((output / "session.json").read_text())


def know_a_speed(output):
    """Of one head's training on this machine, as if it had been measured; of two heads' nothing is known."""
    head = {"device_name": "cpu", "torch": torch.__version__, "cuda": torch.version.cuda}
    head |= {"cudnn": torch.backends.cudnn.version(), "tiny": True}
    known = speed_row("train", "ours", 1, 50.0) | {"precision": "fp32", "seconds": 6.0}
    (output / "bench").mkdir(parents=True)
    (output / "bench/speeds.json").write_text(json.dumps(head | {"rows": [known]}))
    return known


def finish(output, *names):
    """Write down that these steps are finished."""
    content = state(output)
    content["steps"] |= {name: {"seconds": 1.0} for name in names}
    (output / "session.json").write_text(json.dumps(content))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed session's command goes on for a while")
def test_a_killed_session_goes_on_where_it_was(script, tmp_path):
    output = tmp_path / "o"
    know_a_speed(output)
    script("bench/gpu_session.py", *SMALL, "--output", output, "--minutes", 0.01)
    finish(output, *STEPS[:2])
    flags = ("bench/gpu_session.py", *SMALL, "--output", output, "--minutes", 10)
    saved = "work/0Gaussian/2-heads/seed-666/save/*/*/*/*/epoch1.pth"
    with Children(tmp_path, *flags) as session:
        wait_for(lambda: list(output.glob(saved)) or not session.processes[0].is_alive(), 300)
        session.kill()
        assert session.exit_codes() == [-signal.SIGKILL]
    before, speeds = state(output), (output / "bench/speeds.json").read_bytes()
    assert list(before["steps"]) == STEPS[:2] and before["plan"]["epochs"] == 3
    assert "| speed " in (output / "summary.md").read_text()

    wait_for(lambda: is_free(output / "lock"), 200)  # its command ends with it
    code, out, err = script(*flags)
    assert code == 0 and "2 of 8 steps are finished" in out and "8 of 8 steps are finished" in out, err
    after = state(output)
    assert after["plan"] == before["plan"] and list(after["steps"]) == STEPS
    assert (output / "bench/speeds.json").read_bytes() == speeds
    for run in ("h-2-eps-0.8-m-2-lbdlast-0.8", "h-1-m-2"):
        log = (output / f"logs/digits/R8/noise-0.50/train/{run}-train.log").read_text().splitlines()
        assert [line.split("\t")[:2] for line in log[1:]] == [["1", "0.1"], ["2", "0.01"], ["3", "0.001"]]
        assert len(read_log(next((output / "logs").rglob(f"{run}-certify-skip-60.log")))) == 6
    trained = (output / "output/train-2-heads.txt").read_text()
    assert trained.count("epoch 1/3") == 1, "what was trained is not trained again"
    written = (output / "summary.md").read_text()
    assert all(f"| {step} " in written for step in STEPS) and written.count("| Gaussian ") == 2

    folder = output / "release"
    names = sorted(path.name.removesuffix(".sha256") for path in folder.glob("*.sha256"))
    assert names == [f"gaussian-digits-r8-0.5-{name}.pth" for name in sorted(NAMES)]
    assert all(len(list(folder.glob(f"{name}.part-*"))) > 1 for name in names)
    joined = subprocess.run(["sh", "join.sh"], cwd=folder, capture_output=True, text=True)
    assert joined.stdout == "".join(f"{name}: OK\n" for name in names)
    assert "optimizer" not in torch.load(folder / names[0], weights_only=True)

    code, out, _ = script(*flags)
    assert code == 0 and out == "== 8 of 8 steps are finished\n" * 2


def test_what_the_time_cannot_hold_is_named_and_not_begun(script, tmp_path):
    code, out, err = script("bench/gpu_session.py", *SMALL, "--output", "o", "--minutes", 0.1)
    assert code == 0 and "0 of 8 steps are finished" in out, err
    named = re.findall(r"^== not finished: (\S+): ", out, re.MULTILINE)
    assert named == STEPS and "$ cd" not in out
    assert "certify-1-head: it needs train-1-head" in out and not (tmp_path / "o/output").exists()
    assert "| tests " in (tmp_path / "o/summary.md").read_text()


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """plan(rows, seconds, *flags) -> the plan of a session with these speeds and so much time left."""
    monkeypatch.syspath_prepend(str(CODES))
    import gpu_session

    def of(rows, seconds, *flags, run=None):
        given = ("--output", tmp_path, "--minutes", 15, "--dataset", "digits", "--arch", "R8", *flags)
        monkeypatch.setattr(sys, "argv", ["bench/gpu_session.py", *map(str, given)])
        args = gpu_session._flags()
        steps = gpu_session._Steps(SimpleNamespace(left=lambda: seconds, run=run), args)
        (tmp_path / "bench").mkdir(exist_ok=True)
        (tmp_path / "bench/speeds.json").write_text(json.dumps({"device_name": "a card", "rows": rows}))
        return steps._plan()

    return of


def speed_row(task, way, heads, ms, first_seconds=2.0):
    network = {"arch": "R8", "dataset": "digits", "heads": heads, "precision": "bf16", "channels": None}
    figures = {"batch_size": 256, "ms": ms, "speed": 256e3 / ms}
    return network | figures | {"task": task, "way": way, "first_seconds": first_seconds, "next_epoch_seconds": 0.0}


ROWS = [speed_row("train", "ours", 5, 100.0), speed_row("train", "ours", 1, 50.0)]
ROWS += [speed_row("certify", "ours", heads, 25.6) for heads in (5, 1)]  # 10,000 noisy images per second


def test_epochs_follow_from_the_speeds(plan):
    """12 steps per epoch, 1.9 s for both networks, and two starts of 14 s; 18 images take 2 * (12 + 18 s)."""
    found = plan(ROWS, 300, "--skip", 20)
    assert found["epochs"] == int((0.95 * (300 - 2 * (12 + 18 * 1.01)) - 28) / 1.908) == 104
    assert found["lr_step_size"] == 35 and list(found["networks"]) == ["5-heads", "1-head"]
    assert plan(ROWS, 300, "--skip", 1)["epochs"] == int((0.95 * 0.6 * 300 - 28) / 1.908) == 74
    assert plan(ROWS, 3000, "--skip", 20)["epochs"] == 150


def test_steps_are_compiled_where_that_pays_within_the_epochs(plan):
    rows = [*ROWS, speed_row("train", "compiled", 5, 50.0, first_seconds=42.0)]
    compiled = {seconds: plan(rows, seconds, "--skip", 20)["networks"]["5-heads"]["compiled"] for seconds in (150, 600)}
    assert compiled == {150: False, 600: True}


def test_too_few_epochs_are_not_begun(plan):
    from gpu_steps import OutOfTimeError

    with pytest.raises(OutOfTimeError, match=r"an epoch of 5-heads and of 1-head takes 1.9 s: 0.5 minutes hold less"):
        plan(ROWS, 50, "--skip", 20)


EAGER = [row | {"way": "eager"} if row["task"] == "train" else row for row in ROWS]  # the graph's memory was short, say


@pytest.mark.parametrize(
    ("rows", "flags", "heads"),
    [
        (ROWS[1:3], (), [5]),
        (EAGER, (), [5, 1]),
        (ROWS, ("--train_flags=--wd 0.001",), [5, 1]),
        (ROWS, ("--defence", "1Consistency"), [5, 1]),
    ],
)
def test_two_epochs_are_tried_where_no_speed_is_known(plan, monkeypatch, tmp_path, rows, flags, heads):
    """Of a fake run, whose epochs take 2 s each and whose start takes 5."""
    clock, tried = [0.0], []
    monkeypatch.setattr("gpu_session.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def run(name, command, folder, notice):
        """Print two epochs, and no third one."""
        tried.append(command[command.index("--num_heads") + 1])
        (tmp_path / "work/two-epochs").mkdir(parents=True)
        for line, seconds in (("begin", 5), ("epoch 1/150 loss", 2), ("epoch 2/150 loss", 2), ("epoch 3/150", 2)):
            clock[0] += seconds
            notice(line)

    found = plan(rows, 150, "--skip", 20, *flags, run=run)
    assert tried == heads
    assert found["networks"]["5-heads"]["seconds_an_epoch"] == 2.0


def test_a_step_that_fails_is_reported_and_the_next_goes_on(script, tmp_path):
    flags = (*SMALL[2:], "--dataset", "ImageFolder", "--data_dir", "nothing", "--output", "o")
    known = know_a_speed(tmp_path / "o")
    code, out, err = script("bench/gpu_session.py", *flags, "--minutes", 5)
    assert code == 1 and "failed: train-2-heads: exit code 2: train.py: error: no images in" in out, err
    assert (
        list(state(tmp_path / "o")["steps"]) == STEPS[:2]
        and "not finished: certify-1-head: it needs train-1-head" in out
    )
    assert (
        "| train-1-head " in (written := (tmp_path / "o/summary.md").read_text()) and "failed: exit code 2" in written
    )
    rows = json.loads((tmp_path / "o/bench/speeds.json").read_text())["rows"]
    assert known in rows and len(rows) > 1
    assert " skipped in " in (tmp_path / "o/output/tests.txt").read_text() or torch.cuda.is_available()


def test_a_command_ends_with_the_time(tmp_path, capsys):
    from gpu_steps import Session, Step

    with open(tmp_path / "lock", "w") as held:
        session = Session(tmp_path, {}, 0.02, {"tests": 600}, held)
        endless = [sys.executable, "-c", "import time; time.sleep(300)"]
        session.run_all([Step("tests", lambda: session.run("tests", endless, tmp_path), needs=1, budget="tests")])
    out = capsys.readouterr().out
    assert "not finished: tests: its time is over" in out and "$ cd" in out
    assert state(tmp_path)["steps"] == {} and 1 < state(tmp_path)["spent"]["tests"] < 60


def test_another_sessions_output_is_refused(script, tmp_path):
    script("bench/gpu_session.py", *SMALL, "--output", "o", "--minutes", 0.01)
    code, _, err = script("bench/gpu_session.py", *SMALL, "--output", "o", "--minutes", 0.01, "--arch", "R20")
    assert code == 2 and "holds a session with arch R8, not R20: give another --output" in err
    (tmp_path / "o/session.json").write_text("{")
    assert "is not a session's" in script("bench/gpu_session.py", *SMALL, "--output", "o", "--minutes", 1)[2]
    code, _, err = script("bench/gpu_session.py", *SMALL, "--output", "p", "--minutes", 1, "--defence", "9None")
    assert code == 2 and "--defence '9None' must be one of 0Gaussian, " in err


def test_a_file_is_cut_into_parts_that_join_to_it(tmp_path):
    from gpu_parts import cut

    content = os.urandom(2500)
    (tmp_path / "a.pth").write_bytes(content)
    (tmp_path / "parts").mkdir()
    cut(tmp_path / "a.pth", tmp_path / "parts", 1000)
    assert [path.stat().st_size for path in sorted(tmp_path.glob("parts/*.part-*"))] == [1000, 1000, 500]
    done = subprocess.run(["sh", "join.sh"], cwd=tmp_path / "parts", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "a.pth: OK\n"
    assert (tmp_path / "parts/a.pth").read_bytes() == content
