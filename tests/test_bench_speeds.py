"""All speeds in one process: every row is written at once, names why it has no figures, and is not measured twice."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CODES

CPU = torch.device("cpu")


@pytest.fixture
def speeds(monkeypatch):
    monkeypatch.syspath_prepend(str(CODES))
    import bench_speeds

    monkeypatch.setattr(bench_speeds, "_TURNS", 1)
    return bench_speeds


def some(speeds, monkeypatch, count):
    """Let the speeds have the first `count` rows, and one that fails."""
    found = speeds.rows(CPU, tiny=True)
    quick = [replace(row, precision=row.precision and "fp32", batch_size=16) for row in found[:count]]
    chosen = [*quick, replace(found[0], precision="tf32")]
    monkeypatch.setattr(speeds, "rows", lambda device, tiny: chosen)


FLAGS = ("bench/bench.py", "--task", "speeds", "--tiny", "--device", "cpu", "--json", "figures/speeds.json")


def content(tmp_path):
    return json.loads((tmp_path / "figures/speeds.json").read_text())


def test_rows_say_what_was_measured_and_which_failed(script, speeds, monkeypatch, tmp_path):
    some(speeds, monkeypatch, 5)
    code, out, err = script(*FLAGS)
    assert code == 0, err
    found = content(tmp_path)
    assert {"device_name", "torch", "cudnn"} < found.keys() and "| train" in out
    *measured, failed = found["rows"]
    assert [(row["task"], row["way"], row["heads"]) for row in measured[:3]] == [
        ("train", "ours", 2), ("train", "ours", 1), ("train", "authors'", 2),
    ]  # fmt: skip
    for row in measured:
        assert row["ms"] == pytest.approx(1e3 * row["batch_size"] / row["speed"])
        assert ("error" in row) == (row["task"] == "certify" and row["way"] == "ours")
        assert ("first_seconds" in row) == (row["task"] == "train" and row["way"] == "ours")
        assert ("arithmetic" in row) == (row["way"] != "authors'")
    assert 0 < measured[4]["error"] < 1e-5 and measured[0]["captured"] is False
    assert "--precision tf32 needs a GPU" in failed["failed"] and "speed" not in failed


def test_what_the_time_cannot_hold_is_left_out(script, speeds, monkeypatch, tmp_path):
    some(speeds, monkeypatch, 2)
    code, out, err = script(*FLAGS, "--seconds", 0.01)
    assert code == 0 and out.count("left_out it needs about 6 s") == 3, err
    assert all(row["left_out"] == "it needs about 6 s" for row in content(tmp_path)["rows"])


def test_a_killed_measurement_resumes_with_the_missing_rows(script, speeds, monkeypatch, tmp_path):
    some(speeds, monkeypatch, 3)
    measure, begun = speeds._figures_of, []

    def killed(row, *where):
        """Come to the third row, then be killed."""
        begun.append(row)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return measure(row, *where)

    monkeypatch.setattr(speeds, "_figures_of", killed)
    assert script(*FLAGS)[0] == 130
    before = content(tmp_path)["rows"]
    assert [row["heads"] for row in before] == [2, 1]
    assert script(*FLAGS)[0] == 0
    after = content(tmp_path)
    assert after["rows"][:2] == before and len(after["rows"]) == 4 and len(begun) == 5

    (tmp_path / "figures/speeds.json").write_text(json.dumps(after | {"device_name": "another"}))
    assert script(*FLAGS)[0] == 0 and len(begun) == 9, "another card's speeds stay no part of the table"


def test_the_rows_of_a_gpu(speeds):
    """The most valuable come first, none comes twice, and all that is named is there."""
    gpu = speeds.rows(torch.device("cuda"), tiny=False)
    assert len(set(gpu)) == len(gpu)
    assert [(row.task, row.way, row.heads) for row in gpu[:3]] == [
        ("train", "ours", 5), ("train", "ours", 1), ("train", "authors'", 5),
    ]  # fmt: skip
    training = {(row.way, row.heads, row.precision) for row in gpu if row.task == "train"}
    ways = {(way, precision) for way in ("eager", "ours", "compiled") for precision in ("bf16", "tf32")}
    assert training == {(way, heads, p) for way, p in ways | {("authors'", None)} for heads in (5, 1)}
    five = [row for row in gpu if (row.task, row.arch, row.heads, row.channels) == ("certify", "R110", 5, None)]
    sizes = {(row.precision, row.batch_size) for row in five if row.way == "ours"}
    assert sizes == {(p, size) for p in ("bf16", "tf32", "fp32") for size in (1000, 4096, 16384)}
    assert {(row.precision, row.channels) for row in gpu if row.channels} == {
        (p, channels) for p in ("bf16", "tf32") for channels in (16, 32, 64)
    }
    cpu = speeds.rows(CPU, tiny=True)
    assert {row.arch for row in cpu} == {"R8"} and {row.way for row in cpu} == {"ours", "authors'"}
    assert len(set(cpu)) == len(cpu) and {row.precision for row in cpu} == {None, "fp32", "bf16"}
