"""On a real SLURM of two virtual nodes: a job sent back into the queue, or lost with a node, ends as if it were not."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from children import run, wait_for
from conftest import CODES, RUN_FLAGS, without_time
from stand_ins import JOBS, QUEUE, epochs
from test_queue_file import NEEDING

SETUP = Path(__file__).parent.parent / "slurm.sh"
_LACKS = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "pgrep") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(_LACKS) or os.geteuid() != 0,
    reason=f"no SLURM here ({', '.join(_LACKS)} missing): on Debian as root, tests/slurm.sh install",
)


def said_by(*command, **options):
    """What a command prints; it has to end well."""
    result = run(command, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def slurm(tmp_path_factory, monkeypatch):
    """Its folder; SLURM's commands and the recipes' python are the right ones."""
    folder = tmp_path_factory.mktemp("slurm")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    try:
        said_by("bash", SETUP, "start", folder)
        yield folder
    finally:
        run(("bash", SETUP, "stop", folder))


def states():
    """How each job stands, by its number: "RUNNING n1", "PENDING"."""
    lines = said_by("squeue", "--noheader", "--array", "--format=%i %T %N").splitlines()
    return {number: " ".join(how) for number, *how in map(str.split, lines)}


def start_again(*numbers):
    """Without the two minutes' wait, where nothing can still end an earlier run; in another second than it ended in."""
    wait_for(lambda: all(states()[number] == "PENDING" for number in numbers))
    for number in numbers:
        said_by("scontrol", "update", f"jobid={number}", "starttime=now+2")


@pytest.fixture
def hold(stub):
    """No job of the stand-ins has a fourth epoch while these files are there."""
    files = [stub.parent / defence / "hold" for defence in ("0Stub", "1Stub")]
    for file in files:
        file.touch()
    return files


LONGER = [text.replace("--epochs 3", "--epochs 6") for text in (QUEUE, NEEDING)]


OTHER = '[[run]]\nlabel = "other"\ndefence = "0Stub"\nseeds = [1]\n'  # in the same folder


def test_jobs_go_back_into_the_queue_and_a_node_is_lost(queue, work, slurm, hold):
    flag, one = "--slurm=--time=10", ["1Stub/one/seed-1", "1Stub/one/seed-2"]
    code, out, err = queue(LONGER[1], flag)
    assert (code, err) == (0, "")
    first, second = (int(line.split()[1].rstrip(":")) for line in out.splitlines())
    assert out == f"submitted {first}: 2 jobs\nsubmitted {second}: 3 jobs, after {one[0]}, {one[1]}\n"
    wait_for(lambda: all("epoch3.pth" in epochs(work / job) for job in one))
    listed = dict(line.split(maxsplit=1) for line in queue(LONGER[1], "--list")[1].splitlines())
    assert listed[one[1]] == f"running in SLURM as {first}_1, at epoch 3"
    assert listed["1Stub/both"] == f"pending in SLURM as {second}_2"
    for text, again in ((OTHER, "--order=seeds"), (LONGER[1], "--order=seeds"), (LONGER[1], flag)):
        code, _, err = queue(text, again)
        assert code == 75 and err.endswith(
            f"jobs queued or running in SLURM: 5; wait, or run: scancel {first} {second}\n"
        )

    lost, back = sorted((f"{first}_0", f"{first}_1"), key=states().get, reverse=True)
    assert states()[lost] == "RUNNING n2"
    said_by("scancel", "--signal=USR1", "--batch", back)  # as --time does
    said_by("bash", SETUP, "node-down", slurm, "n2")
    start_again(back, lost)
    for file in hold:
        file.unlink()
    wait_for(lambda: not states(), 120)
    assert queue(LONGER[1], "--list")[1].count("  finished\n") == 5
    logs = list(work.rglob("run-train.log"))
    assert len(logs) == 4 and all(log.read_text().split() == list("123456") for log in logs)
    (output,) = (work / "slurm").glob(f"{back}.txt")
    assert f"goes back into SLURM's queue as {back}" in output.read_text()
    assert (queue(LONGER[1], flag)[:2], states()) == ((0, "all 5 jobs are finished\n"), {})


def test_a_time_limit_in_which_nothing_gets_done_is_no_reason_to_go_back(queue, work, hold):
    only = LONGER[0].replace("seeds = [1, 2]", "seeds = [1]")
    number = queue(only, "--slurm=")[1].split()[1].rstrip(":") + "_0"
    ids = set()
    for _ in range(2):
        wait_for(
            lambda: (work / JOBS[0] / "save/pid").exists() and (work / JOBS[0] / "save/pid").read_text() not in ids
        )
        wait_for(lambda: "epoch3.pth" in epochs(work / JOBS[0]))
        ids.add((work / JOBS[0] / "save/pid").read_text())
        said_by("scancel", "--signal=USR1", "--batch", number)
        if len(ids) == 1:
            start_again(number)
    wait_for(lambda: number not in states())
    output = (work / "slurm" / f"{number}.txt").read_text()
    assert "left no checkpoint and no row within its time limit: give a longer --time" in output
    said_by("scancel", "--user=root")
    wait_for(lambda: not states())
    assert f"  begun, at epoch 3; was {number} in SLURM: experiments.py: stopped: " in queue(only, "--list")[1]


def test_flags_that_sbatch_cannot_take_are_one_line(queue):
    assert queue(QUEUE, "--slurm", "--time=3")[0] == 2
    for flags, message in (
        ("--array=1-3", "--slurm must not hold --array=1-3: the queue sets --array, --dependency"),
        ("-a0", "must not hold -a0"),
        ("-W", "must not hold -W"),
        ("--dep=x", "must not hold --dep=x"),
        ("--test-only", "sbatch has submitted nothing"),
        ("--time=3 a.sh", "--slurm '--time=3 a.sh': 'a.sh' is no flag; write --flag=value"),
        ("--time='3", "--slurm '--time='3': No closing quotation"),
        ("--partition=none", "sbatch: invalid partition specified: none; Batch job submission failed"),
    ):
        code, _, err = queue(QUEUE, f"--slurm={flags}")
        assert code == 2 and err.count("\n") == 1 and message in err and not states()


def test_shards_are_merged_into_the_log_of_one_run(certify, script, digits_models, tmp_path):
    """The second of them is sent back into the queue."""
    whole = certify("whole")
    flags = ("--model_path", digits_models[0], "--logs_dir", tmp_path / "shards", "--skip", 30, *RUN_FLAGS)
    own = ("--parsable", "--gpus=0", "--cpus-per-task=1", "--array=1-2", f"--output={tmp_path}/%a.txt")
    recipe = CODES / "clusters" / "slurm_shards.sh"
    number = said_by("sbatch", *own, recipe, 2, CODES / "0Gaussian", *flags).strip() + "_2"
    wait_for(lambda: list((tmp_path / "shards").rglob("*-shard-2-of-2.json")))
    said_by("scancel", "--signal=USR1", "--batch", number)
    start_again(number)
    wait_for(lambda: not states(), 120)
    shards = list((tmp_path / "shards").rglob("*-of-2.log"))
    code, _, err = script("merge_logs.py", *shards)
    assert (code, err) == (0, ""), (tmp_path / "2.txt").read_text()
    (merged,) = (tmp_path / "shards").rglob(whole.name)
    assert without_time(merged) == without_time(whole)
