"""Which GPUs a queue finds, and which of them each of its jobs sees."""

import os
import re

import pytest
from stand_ins import JOBS, QUEUE

from spacte.jobs.gpus import visible_gpus
from spacte.jobs.queue import Queue
from spacte.jobs.queue_file import read_queue


def gpus_seen(work):
    """What each job's train.py had in CUDA_VISIBLE_DEVICES."""
    return {
        str(path.parent.relative_to(work)): re.search(r"^GPU: (.*)$", path.read_text(), re.MULTILINE)[1]
        for path in work.rglob("seed-*/output.txt")
    }


def test_each_process_has_a_gpu_of_its_own(queue, work, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-b")
    text = QUEUE.replace('defence = "1Stub"', 'defence = "1Stub"\ntrain = "--device cuda:1"')
    assert queue(text, "--processes", 3)[0] == 0
    seen = gpus_seen(work)
    assert seen[JOBS[0]] == seen[JOBS[2]] == "3", "in the slots 0 and 2"
    assert seen[JOBS[1]] == seen[JOBS[3]] == "3,GPU-b", "the job says which"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-b"
    assert "; CUDA_VISIBLE_DEVICES=3 " in (work / JOBS[0] / "output.txt").read_text()


@pytest.mark.parametrize(("visible", "flags"), [("3", ("--processes", 2)), ("3,4", ()), ("-1", ("--processes", 2))])
def test_where_there_is_nothing_to_deal_out_jobs_see_what_the_queue_sees(queue, work, monkeypatch, visible, flags):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    queue(QUEUE, *flags)
    assert set(gpus_seen(work).values()) == {visible}


def test_a_slot_is_taken_again_once_its_job_has_ended(queue, stub, tmp_path, work):
    queue(QUEUE, "--list")
    jobs, taken = read_queue(tmp_path / "queue.toml", stub.parent, work, "seeds")[:4], []

    class StandIn:
        def __init__(self, job, slot):
            self.job, self.slot, self.looks = job, slot, 1 if job is jobs[1] else 3
            taken.append(slot)

        def advance(self):
            self.looks -= 1
            return self.looks == 0

        def seconds(self):
            return 0

        def end(self):
            pass

    Queue(jobs, 2, StandIn).run_all()
    assert taken == [0, 1, 1, 0]


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-cccc-3)
  MIG 1g.10gb     Device  1: (UUID: MIG-dddd-4)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-eeee-5)
"""


@pytest.mark.parametrize(("variable", "answer", "found"), [
    (None, f"cat <<E\n{LISTED}E", ["GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4", "GPU-eeee-5"]),
    (None, "echo NVIDIA-SMI has failed; exit 9", []),
    (None, None, []),
    ("2, GPU-x,MIG-y", None, ["2", "GPU-x", "MIG-y"]),
    ("1,-1,0", None, ["1"]), ("", None, []), ("NoDevFiles", None, []),
])  # fmt: skip
def test_the_visible_gpus_are_found_without_torch(monkeypatch, tmp_path, variable, answer, found):
    if answer is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if answer else str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == found
