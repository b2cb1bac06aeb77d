"""What a session on a GPU has found, as a page of tables: machine, steps, speeds, training, certificates."""

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from gpu_plan import read_speeds
from spacte.logs.table import markdown, render
from spacte.report.reading import read_runs
from spacte.report.table import reached_radii, summary
from spacte.utils import UserError

_PUBLISHED = """Published of this network, 150 epochs, sigma .5: ACR .668 with five heads, .538 with one. EXPERIMENTS.md
has all figures, "CIFAR-10: the paper's nine runs"; report.py has made them of logs, too."""
_PAPERS = {"defence": "0Gaussian", "dataset": "CIFAR10", "arch": "R110", "noise_sd": 0.5, "num_heads": 5}


def page(output: Path, state: dict, unfinished: dict[str, str]) -> str:
    """The summary of a session's folder, from its `state`, and why steps are `unfinished`."""
    machine, rows = read_speeds(output / "bench/speeds.json")
    named = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    settings = state["settings"]
    given = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, "", False))
    parts = [f"# A GPU session, {datetime.now(UTC):%Y-%m-%d}", named, f"Settings: {given}."]
    parts += ["## Steps", _steps(state, unfinished)]
    if rows:
        parts += ["## Speed", _speeds(rows)]
    if "plan" in state:
        parts += ["## Training", _training(state)]
    if list((output / "logs").rglob("*-certify-skip-*.log")):
        parts += ["## Certificates", _certificates(output / "logs")]
        if _PAPERS.items() <= settings.items():
            parts.append(_PUBLISHED)
    return "\n\n".join(part for part in parts if part) + "\n"


def _steps(state: dict, unfinished: dict[str, str]) -> str:
    spent, states = state.get("spent", {}), unfinished | dict.fromkeys(state["steps"], "finished")
    names = list(dict.fromkeys([*state["steps"], *spent, *unfinished]))
    rows = [{"step": n, "seconds": spent.get(n), "state": states.get(n, "not finished")} for n in names]
    return markdown(pd.DataFrame(rows)) if rows else "None yet."


def _speeds(rows: list[dict]) -> str:
    """The measured rows with their ratios to the authors' way, then those without figures."""
    authors = {_network(row): row["speed"] for row in rows if row["way"] == "authors'" and "speed" in row}
    table, others = [], []
    for row in rows:
        what = dict(zip(("task", "network"), _network(row), strict=True))
        what |= {name: row[name] for name in ("way", "precision", "batch_size", "channels")}
        if "speed" not in row:
            reason = row.get("failed") or f"left out, {row['left_out']}"
            others.append(f"- {', '.join(str(value) for value in what.values() if value is not None)}: {reason}")
            continue
        theirs = authors.get(_network(row))
        figures = {"noisy images/s": round(row["speed"]), "ms": row["ms"], "ratio": theirs and row["speed"] / theirs}
        table.append(what | figures | {name: row.get(name) for name in ("first_seconds", "error", "gib")})
    text = markdown(pd.DataFrame(table).convert_dtypes()) if table else "None was measured."
    without = "\n".join(["Without figures:", "", *others]) if others else ""
    return f"{text}\n\n`ratio`: to the authors' way on the same network.\n\n{without}".strip()


def _network(row: dict) -> tuple[str, str]:
    """The task, and the network that it is done with."""
    return row["task"], f"{row['arch']}, {row['dataset']}, {row['heads']} head{'s' * (row['heads'] > 1)}"


def _training(state: dict) -> str:
    plan, spent = state["plan"], state.get("spent", {})
    rows = []
    for name, one in plan["networks"].items():
        row = {"network": name, "epochs": plan["epochs"], "learning rate drops after": plan["lr_step_size"]}
        row |= {"compiled": "yes" if one["compiled"] else "no", "seconds planned": one["seconds"]}
        rows.append(row | {"seconds": spent.get(f"train-{name}")})
    return markdown(pd.DataFrame(rows))


def _certificates(logs: Path) -> str:
    try:
        runs = read_runs([logs])
        return render(summary(runs, reached_radii(runs)), "markdown")
    except UserError as error:  # no image is certified yet
        return f"None yet: {error}."
