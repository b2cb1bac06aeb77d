"""A session of a limited time, on the CPU: what is finished stays, what does not fit or fails is named."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from children import wait_for
from conftest import CODES

from spacte.logs.certlog import read_log
from spacte.utils import UserError, lock

SMALL = ("--dataset", "digits", "--arch", "R8", "--num_heads", 2, "--epochs", 5, "--skip", 60, "--N", 300)
SMALL += ("--device", "cpu", "--tiny", "--train_flags=--wd 0.001")


def is_free(path):
    try:
        with lock(path, "taken"):
            return True
    except UserError:
        return False


def state(output):
    return json.loads((output / "session.json").read_text())


def finish(output, *names):
    """Write down that these steps are finished."""
    content = state(output)
    content["steps"] |= {name: {"like": None, "seconds": 1.0} for name in names}
    (output / "session.json").write_text(json.dumps(content))


BENCH = [f"bench-{task}-R8-2-heads-fp32-32" for task in ("certify", "train")]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed session's command goes on for a while")
def test_a_killed_session_goes_on_where_it_was(script, tmp_path):
    output = tmp_path / "o"
    command = [sys.executable, CODES / "gpu_session.py", *SMALL, "--output", output, "--minutes", 10]
    saved = "work/0Gaussian/session/seed-666/save/*/*/*/*/epoch2.pth"
    with open(tmp_path / "said.txt", "w") as said:
        child = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, start_new_session=True)
        try:
            wait_for(lambda: list(output.glob(saved)) or child.poll() is not None, 200)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    before, figures = state(output), [path.read_bytes() for path in sorted(output.glob("bench/*"))]
    assert list(before["steps"]) == ["tests", *BENCH] and before["plan"]["epochs"] == 5 and len(figures) == 2
    assert "19 skipped" in (output / "output/tests.txt").read_text() or torch.cuda.is_available()

    wait_for(lambda: is_free(output / "lock"), 200)  # its command ends with it
    code, out, err = script("gpu_session.py", *SMALL, "--output", output, "--minutes", 10)
    assert code == 0 and "3 of 6 steps are finished" in out and "6 of 6 steps are finished" in out, err
    after = state(output)
    assert after["plan"] == before["plan"] and list(after["steps"]) == ["tests", *BENCH, "train", "release", "certify"]
    assert figures == [path.read_bytes() for path in sorted(output.glob("bench/*"))]
    log = next((output / "logs").rglob("*-train.log")).read_text().splitlines()
    assert [line.split("\t")[0] for line in log] == ["epoch", "1", "2", "3", "4", "5"]
    assert [line.split("\t")[1] for line in log[1:]] == ["0.1", "0.1", "0.01", "0.01", "0.001"]
    assert len(read_log(next((output / "logs").rglob("*-certify-skip-60.log")))) == 6
    trained = (output / "output/train.txt").read_text()
    assert "--wd 0.001" in trained and trained.count("epoch 1/5") == 1, "what was trained is not trained again"

    folder = output / "release"
    (name,) = (path.name.removesuffix(".sha256") for path in folder.glob("*.sha256"))
    assert len(list(folder.glob(f"{name}.part-*"))) > 1
    assert subprocess.run(["sh", "join.sh"], cwd=folder, capture_output=True, text=True).stdout == f"{name}: OK\n"
    assert "optimizer" not in torch.load(folder / name, weights_only=True)

    code, out, _ = script("gpu_session.py", *SMALL, "--output", output, "--minutes", 10)
    assert code == 0 and out == "== 6 of 6 steps are finished\n" * 2


def test_what_the_time_cannot_hold_is_named_and_not_begun(script, tmp_path):
    code, out, err = script("gpu_session.py", *SMALL, "--output", "o", "--minutes", 0.1)
    assert code == 0 and "0 of 6 steps are finished" in out, err
    named = re.findall(r"^== not finished: (\S+): ", out, re.MULTILINE)
    assert named == ["tests", *BENCH, "train", "release", "certify"] and "$ cd" not in out
    assert "certify: it needs train" in out and not (tmp_path / "o/output").exists()


def test_too_few_epochs_are_not_begun(script, tmp_path):
    flags = (*SMALL, "--output", "o", "--training_share", 0.001)
    script("gpu_session.py", *flags, "--minutes", 0.01)
    finish(tmp_path / "o", "tests", *BENCH)
    code, out, err = script("gpu_session.py", *flags, "--minutes", 5)
    assert code == 0 and re.search(r"not finished: train: an epoch takes \d+ s: 0.0 minutes hold less than 3", out), err
    assert "plan" not in state(tmp_path / "o")


def test_a_step_that_fails_is_reported_and_the_next_goes_on(script, tmp_path):
    flags = (*SMALL[2:], "--dataset", "ImageFolder", "--data_dir", "nothing", "--output", "o")
    script("gpu_session.py", *flags, "--minutes", 0.01)
    finish(tmp_path / "o", "tests", BENCH[0])
    code, out, err = script("gpu_session.py", *flags, "--minutes", 5)
    assert code == 1 and "failed: train: exit code 2: train.py: error: no images in" in out, err
    assert BENCH[1] in state(tmp_path / "o")["steps"] and "not finished: certify: it needs train" in out


def test_a_command_ends_with_the_time(script, tmp_path):
    flags = (*SMALL, "--output", "o")
    script("gpu_session.py", *flags, "--minutes", 0.01)
    finish(tmp_path / "o", *BENCH)
    content = state(tmp_path / "o")
    content["steps"]["earlier"] = {"like": "tests", "seconds": 0.1}
    (tmp_path / "o/session.json").write_text(json.dumps(content))
    code, out, err = script("gpu_session.py", *flags, "--minutes", 0.01)
    assert code == 0 and "not finished: tests: its time is over" in out and "$ cd" in out, err


def test_another_sessions_output_is_refused(script, tmp_path):
    script("gpu_session.py", *SMALL, "--output", "o", "--minutes", 0.01)
    code, _, err = script("gpu_session.py", *SMALL, "--output", "o", "--minutes", 0.01, "--arch", "R20")
    assert code == 2 and "holds a session with arch R8, not R20: give another --output" in err
    (tmp_path / "o/session.json").write_text("{")
    assert "is no session's" in script("gpu_session.py", *SMALL, "--output", "o", "--minutes", 1)[2]
    code, _, err = script("gpu_session.py", *SMALL, "--output", "p", "--minutes", 1, "--defence", "9None")
    assert code == 2 and "--defence '9None' must be one of 0Gaussian, " in err


def test_a_file_is_cut_into_parts_that_join_to_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(CODES))
    from gpu_session import cut

    content = os.urandom(2500)
    (tmp_path / "a.pth").write_bytes(content)
    (tmp_path / "parts").mkdir()
    command = cut(tmp_path / "a.pth", tmp_path / "parts", 1000)
    assert [path.stat().st_size for path in sorted(tmp_path.glob("parts/*.part-*"))] == [1000, 1000, 500]
    done = subprocess.run(command, shell=True, cwd=tmp_path / "parts", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "a.pth: OK\n"
    assert (tmp_path / "parts/a.pth").read_bytes() == content
