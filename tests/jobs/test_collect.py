"""The finished jobs' logs, collected for others to read."""

import gzip
import json
from pathlib import Path

from conftest import load_file
from stand_ins import QUEUE


def test_the_logs_of_finished_jobs_are_collected_once(queue, tmp_path, work):
    queue(QUEUE)
    (work / "0Stub/five/seed-1/job.json").unlink()
    assert "4 of 5 jobs are finished: 19 files copied" in queue(QUEUE, "--collect", tmp_path / "collected")[1]
    copies = [
        path.relative_to(tmp_path / "collected") for path in (tmp_path / "collected").rglob("*.*") if path.is_file()
    ]
    assert len(copies) == 19 and not any("five/seed-1" in str(path) for path in copies)
    for path in copies:
        job = "1Stub/both" if "both" in path.parts else "/".join(path.parts[:3])
        original = work / job / "logs" / path.relative_to(job)
        collected = (tmp_path / "collected" / path).read_bytes()
        if path.suffix == ".gz":
            original, collected = original.with_suffix(""), gzip.decompress(collected)
        assert collected == original.read_bytes() or path.suffix == ".json"
        assert bytes(work) not in collected
        assert path.suffix != ".json" or all(name.startswith("WORK/") for name in json.loads(collected))
    assert " 0 files copied" in queue(QUEUE, "--collect", tmp_path / "collected")[1]


def test_only_whole_paths_are_taken_for_the_work_folder(tmp_path):
    experiments = load_file("experiments.py", tmp_path / "experiments_copy.py")
    there = b'["/data", "/data/x", "--data_dir=/data/y", "../../data", "/data-old/x", "a /data/x"]'
    here = b'["WORK", "WORK/x", "--data_dir=WORK/y", "../../data", "/data-old/x", "a /data/x"]'
    assert experiments._without(Path("/data"), b"WORK", there) == here


def test_compressed_counts_are_collected(queue, tmp_path, work):
    queue(QUEUE)
    (counts,) = (work / "1Stub/both/logs").rglob("*-counts.jsonl")
    counts.rename(counts.with_name(f"{counts.name}.gz"))
    queue(QUEUE, "--collect", tmp_path / "collected")
    assert [path.suffix for path in (tmp_path / "collected/1Stub/both").rglob("*-counts*")] == [".gz"]
