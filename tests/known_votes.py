"""Certification logs of votes that a test names."""

import json

import numpy as np

from spacte.logs.certified import certified
from spacte.logs.certlog import HEADER, format_row
from spacte.logs.config import RunConfig
from spacte.logs.counts import VoteCounts

N, SIGMA = 1000, 0.5
CONFIG = {
    "kind": "certify", "dataset": "CIFAR10", "arch": "R8", "num_heads": [2], "noise_sd": SIGMA, "head": None,
    "defence": "Gaussian", "alpha": 0.001, "noise_slack": 0, "sequential": None, "skip_wrong": False, "N0": 100, "N": N,
    "certificate": "cohen",
}  # fmt: skip


def votes(*of_voters):
    """Votes for classes 0, 1 and 2 of each voter, as [V, 3]."""
    return np.array([[a, b, N - a - b] for a, b in of_voters])


def run_with(path, images, seed=0, first=0, **config):
    """A log with its counts: `images`, of idx `first` on, are (label, estimation [V, 3]; None: not drawn)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config, rows, lines = CONFIG | config, [], []
    for idx, (label, estimation) in enumerate(images, first):
        heads = sum(config["num_heads"])
        shown = votes(*[(0, 0)] * (heads + (heads > 1))) if estimation is None else estimation
        one = VoteCounts(
            idx,
            label,
            0.5,
            100 * np.eye(3, dtype=int)[shown.argmax(-1)],
            0 * shown if estimation is None else estimation,
        )
        rows.append(format_row(idx, label, *certified(one, RunConfig.from_json(config)), one.seconds))
        lines.append(one.to_line())
    path.write_text(HEADER + "".join(rows))
    path.with_name(f"{path.stem}-counts.jsonl").write_text("".join(lines))
    path.with_suffix(".json").write_text(json.dumps({"config": config, "about": {"training": [{"seed": seed}]}}))
    return path
