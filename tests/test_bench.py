"""bench.py: the plain way and ours, in turns."""

import json


def test_the_benchmark(script, tmp_path):
    """Every field is there, and the ratio is that of the two speeds; one turn has no other median."""
    flags = ("--arch", "R8", "--dataset", "digits", "--turns", 1, "--seconds", 0.05, "--batch_size", 32)
    code, out, err = script(
        "bench/bench.py",
        *flags,
        "--device",
        "cpu",
        "--json",
        tmp_path / "figures" / "bench.json",
        "--markdown",
        tmp_path / "records" / "today.md",
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "figures" / "bench.json").read_text())
    assert [row["task"] for row in rows] == ["certify", "train"]
    for row in rows:
        assert {"arch", "dataset", "heads", "device", "precision", "batch_size", "ceiling_fraction"} < row.keys()
        assert row["plain"] > 0 and row["ratio"] == row["fast"] / row["plain"] and row["ceiling_fraction"] > 0
    assert f"| {rows[0]['arch']}" in out
    record = (tmp_path / "records" / "today.md").read_text()
    assert (
        record.startswith("## 20") and "python codes/bench/bench.py --arch R8" in record and "| certify | R8" in record
    )
    code, _, err = script("bench/bench.py", *flags, "--task", "certify", "table")
    assert code == 2 and "--task table has flags of its own: give it alone" in err
    code, _, err = script("bench/bench.py", "--dataset", "CIFAR100")
    assert code == 2 and "--dataset needs --arch" in err
    code, _, err = script("bench/bench.py", *flags, "--json", "/dev/null/bench.json")
    assert code == 2 and "cannot write to '/dev/null'" in err
