"""What the README shows and no other test runs: a defence and a classifier of the user's own, the tools."""

import json
import re

import torch
from conftest import CODES, EXCERPTS, ROOT, TINY

README = (ROOT / "README.md").read_text()


def block_with(text):
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in code]
    return block


def test_torchrun_is_kept_from_reading_the_scripts_flags():
    """Without the two hyphens, `--max` would be torchrun's own --max-restarts, cut short."""
    texts = [README, (ROOT / "EXPERIMENTS.md").read_text(), (CODES / "certify_mhead.py").read_text()]
    lines = [line for text in texts for line in re.findall(r"^torchrun .*$", text, re.MULTILINE)]
    assert len(lines) >= 2 and all(" -- " in line for line in lines)


def test_a_defence_of_ones_own(script, tmp_path):
    folder = tmp_path / "3Mine"
    folder.mkdir()
    (folder / "train.py").write_text(block_with("class Mine"))
    (folder / "spacte").symlink_to(CODES / "spacte")
    code, _, err = script(folder / "train.py", *TINY, "--num_heads", 2, "--epochs", 1, "--strength", 0.5)
    assert code == 0, err
    (path,) = (tmp_path / "save").rglob("epoch1.pth")
    assert torch.load(path, weights_only=True)["defence"] == "Mine"
    (log,) = (tmp_path / "logs").rglob("*-train.log")
    assert "penalty" in log.read_text().splitlines()[0].split("\t")


def test_a_classifier_of_ones_own():
    names = {"classifier": lambda images: torch.eye(10)[[3] * len(images)], "image": torch.zeros(3, 8, 8)}
    exec(block_with("label, radius = Smooth("), names)
    assert names["label"] == 3 and 0.9 < names["radius"] < 1


def test_the_benchmark(script, tmp_path):
    """Every field is there, and the ratio is that of the two speeds; one turn has no other median."""
    flags = ("--arch", "R8", "--dataset", "digits", "--turns", 1, "--seconds", 0.05, "--batch_size", 32)
    code, out, err = script("bench.py", *flags, "--device", "cpu", "--json", tmp_path / "figures" / "bench.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "figures" / "bench.json").read_text())
    assert [row["task"] for row in rows] == ["certify", "train"]
    for row in rows:
        assert {"arch", "dataset", "heads", "device", "precision", "batch_size", "ceiling_fraction"} < row.keys()
        assert row["plain"] > 0 and row["ratio"] == row["fast"] / row["plain"] and row["ceiling_fraction"] > 0
    assert f"| {rows[0]['arch']}" in out
    code, _, err = script("bench.py", *flags, "--json", "/dev/null/bench.json")
    assert code == 2 and "cannot write to '/dev/null'" in err


def test_the_savings_of_sequential_certification(script):
    code, out, err = script("sequential_savings.py", *sorted(EXCERPTS.rglob("*.log")))
    assert code == 0, err
    assert out.count("\n") >= 5 and "Gaussian" in out
