"""Stand-ins for train.py and certify_mhead.py, which take no time, and a queue of them: fixtures for every test."""

import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import CODES

TRAIN = """
import os, sys, time
from pathlib import Path

flags = {name: value for name, value in zip(sys.argv, sys.argv[1:] + [""])}
epochs = int(flags["--epochs"])
print("GPU:", os.environ.get("CUDA_VISIBLE_DEVICES"))
if "--fail" in flags:
    sys.exit("train.py: error: --fail was given")
run = Path(flags["--save_dir"], "digits/R8/noise-0.50/run")
log = Path(flags["--logs_dir"], "digits/R8/noise-0.50/train/run-train.log")
run.mkdir(parents=True, exist_ok=True)
log.parent.mkdir(parents=True, exist_ok=True)
Path(flags["--save_dir"], "pid").write_text(str(os.getpid()))
done = max((int(path.stem[5:]) for path in run.glob("epoch*.pth")), default=0)
for epoch in range(done + 1, epochs + 1):
    end = time.monotonic() + 300
    while epoch == 4 and Path("hold").exists() and time.monotonic() < end:
        time.sleep(0.02)
    (run / f"epoch{epoch}.pth").write_text(flags["--seed"])
    with open(log, "a") as file:
        file.write(f"{epoch}\\n")
    print(f"epoch {epoch}/{epochs}  0:00:01 left", flush=True)
"""
CERTIFY = """
import json
import sys
from pathlib import Path

models = sys.argv[sys.argv.index("--model_path") + 1 :]
folder = Path(sys.argv[sys.argv.index("--logs_dir") + 1], "digits/R8/noise-0.50/certify-mhead")
folder.mkdir(parents=True, exist_ok=True)
for ending in (".log", "-counts.jsonl", "-ACR.log"):
    (folder / f"run{ending}").write_text("".join(f"{Path(path).name} {Path(path).read_text()}\\n" for path in models))
(folder / "run.json").write_text(json.dumps(models))
"""
QUEUE = """
[defaults]
seeds = [1, 2]
train = "--epochs 3"
certify = "--N 100"
[[run]]
label = "five"
defence = "0Stub"
train = "--num_heads 5"
[[run]]
label = "one"
defence = "1Stub"
[[ensemble]]
label = "both"
of = "one"
"""
JOBS = ["0Stub/five/seed-1", "1Stub/one/seed-1", "0Stub/five/seed-2", "1Stub/one/seed-2", "1Stub/both"]


@pytest.fixture
def stub(tmp_path):
    """experiments.py beside two defences that take no time, in a folder with a space and a quote in its name."""
    codes = tmp_path / "that's a checkout" / "codes"
    for defence in ("0Stub", "1Stub"):
        (codes / defence).mkdir(parents=True)
        (codes / defence / "train.py").write_text(TRAIN)
        (codes / defence / "certify_mhead.py").write_text(CERTIFY)
    (codes / "spacte").symlink_to(CODES / "spacte")
    return Path(shutil.copy(CODES / "experiments.py", codes))


@pytest.fixture
def work(tmp_path):
    return tmp_path / "the wörk"


@pytest.fixture
def quick_queues(monkeypatch):
    """Queues in this process look often, and their jobs have the usual priority: others on the machine would make them
    wait.
    """
    monkeypatch.setattr(os, "nice", lambda step: None)
    monkeypatch.setattr("spacte.jobs.queue._SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.fixture
def queue(script, stub, tmp_path, work, quick_queues):
    """Run the queue of a text: queue(text, flags) -> exit code, stdout, stderr."""

    def run(text, *flags):
        (tmp_path / "queue.toml").write_text(text)
        return script(stub, "queue.toml", "--work", work, *flags)

    return run


def said(out, word):
    """The jobs that a line was printed of, in order."""
    return re.findall(rf"^{word} +(\S+?):?(?: |$)", out, re.MULTILINE)


def epochs(folder):
    return sorted(path.name for path in folder.rglob("epoch*.pth"))
