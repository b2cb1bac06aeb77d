"""How many epochs fit into a time, and what certification takes, from the speeds of bench_speeds.py.

speeds -> paces of each training -> epochs
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

_PROCESS = 12  # seconds of a training beside its epochs: Python, torch, the data, the last checkpoint
_BESIDE_STEPS = 1.06  # augmentation, a smaller last batch, a look at the test images now and then


@dataclass(frozen=True)
class Pace:
    """What a training takes: the seconds of its start and of an epoch; `compiled`: with --compile."""

    start: float
    epoch: float
    compiled: bool = False


def read_speeds(path: Path) -> tuple[dict, list[dict]]:
    """What bench_speeds.py's file says of the machine, and its rows; nothing where there is none."""
    try:
        content = json.loads(path.read_text())
        rows = content.pop("rows")
    except (OSError, ValueError, KeyError, AttributeError):
        return {}, []
    return content, rows


def rows_of(rows: list[dict], **described) -> list[dict]:
    """The measured rows whose fields have these values, such as task="train", heads=5."""
    return [row for row in rows if "speed" in row and described.items() <= row.items()]


def paces_of(rows: list[dict], steps: int) -> list[Pace]:
    """Those of train.py with and without --compile, at that many steps per epoch, from rows of one network."""
    return [
        Pace(
            _PROCESS + row["first_seconds"],
            _BESIDE_STEPS * steps * row["ms"] / 1e3 + row["next_epoch_seconds"],
            row["way"] == "compiled",
        )
        for row in rows
        if row["way"] in ("ours", "compiled")
    ]


def epochs_within(seconds: float, paces: list[list[Pace]], most: int) -> tuple[int, list[Pace]]:
    """The most epochs, at most `most`, that all trainings can have in the seconds, and each one's pace for that.

    `paces` are those that each training can have. Of paces that allow as many epochs the one that takes less time is
    chosen: compiling has to pay within these epochs.
    """

    def value(chosen: tuple[Pace, ...]) -> tuple[int, float]:
        """Its number of epochs, and how little time they take."""
        start, epoch = sum(one.start for one in chosen), sum(one.epoch for one in chosen)
        epochs = max(0, min(most, int((seconds - start) / epoch)))
        return epochs, -(start + epochs * epoch)

    best = max(itertools.product(*paces), key=value)
    return value(best)[0], list(best)


def certification_seconds(rows: list[dict], draws: int) -> float | None:
    """What drawing that many noisy images takes certify_mhead.py, with its start; None without rows of its network."""
    speeds = [row["speed"] for row in rows if row["way"] == "ours" and row["channels"] is None]
    return _PROCESS + draws / min(speeds) if speeds else None
