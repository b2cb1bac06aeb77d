"""Tables from certification logs."""

from pathlib import Path

import numpy as np
import pandas as pd

from spacte.certlog import average_certified_radius, certified_accuracy, read_log
from spacte.counts import log_table, read_votes
from spacte.runfiles import RunFiles
from spacte.utils import UserError

RADIUS_STEP = 0.25


def table_radii(limit: float, step: float = RADIUS_STEP) -> np.ndarray:
    """The radii of a table: 0, step, 2 step, ... up to `limit`."""
    return step * np.arange(int(limit / step) + 1)


def summary(logs: dict[str, pd.DataFrame], radii=None) -> pd.DataFrame:
    """A row a log: images, abstained, ACR, certified accuracy at each radius, the last three in [0, 1].

    Radii default to those of `table_radii` that some image of some log reaches.
    """
    if radii is None:
        radii = table_radii(max(float((log["correct"] * log["radius"]).max()) for log in logs.values()))
    rows = []
    for name, log in logs.items():
        accuracies = {f"{r:g}": share for r, share in zip(radii, certified_accuracy(log, radii), strict=True)}
        abstained = float((log["predict"] == -1).mean())
        rows.append({"": name, "images": len(log), "abstain": abstained, "ACR": average_certified_radius(log)})
        rows[-1] |= accuracies
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """A summary as a markdown table with three decimals."""
    return table.to_markdown(index=False, floatfmt=".3f")


def read_logs(paths: list[Path], heads: bool) -> dict[str, pd.DataFrame]:
    """Logs by run name; with `heads` also each head alone, from the vote counts beside a log of several heads."""
    logs = {}
    for name, path in zip(_names(paths), paths, strict=True):
        log = read_log(path)
        if heads:
            files = RunFiles(path)
            config, votes = files.read_json()["config"], read_votes(files.counts)
            if config["skip_wrong"]:
                raise UserError(f"'{path}' was made with --skip_wrong: the heads alone were not counted on every image")
            for head in range(len(votes[0].selection) - 1):
                logs[f"{name}, head {head} alone"] = log_table(votes, config | {"head": head})
        logs[name] = log
    return logs


def _names(paths: list[Path]) -> list[str]:
    """The logs' names, with as many of their folders as it takes to tell them apart."""
    parts = [path.absolute().with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("a log is given twice")
