"""One self-contained HTML page of a report: table, curves, comparisons, every image, configurations."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

from spacte.report import plots
from spacte.report.comparison import Comparison
from spacte.report.runs import Run, labels, printable
from spacte.report.table import TEXTS, best, records, without_single_group
from spacte.utils import check_ending, replace_file

ENDINGS = (".html", ".htm")
_TEMPLATE = Path(__file__).with_name("page.html")


def write(runs: list[Run], table: pd.DataFrame, comparisons: list[Comparison], path: Path) -> None:
    """Write the page; `table` is the runs' summary. UserError where this is not possible."""
    check_ending(path, ENDINGS)
    marks = best(table)
    table = without_single_group(table[["run", *table.columns.drop("run")]])
    data = {
        "table": {
            "columns": list(table),
            "texts": TEXTS,
            "rows": [list(row.values()) for row in records(table)],
            "best": marks[table.columns].to_numpy().tolist(),
        },
        "comparisons": [one.record() for one in comparisons],
        "runs": [{"label": label, "log": printable(run.path), "config": run.config}
                 for label, run in zip(labels(runs), runs, strict=True)],
        "images": _images(runs),
    }  # fmt: skip
    embedded = json.dumps(data).replace("<", "\\u003c")  # no text of a log can end the script
    html = (
        _TEMPLATE.read_text(encoding="utf-8")
        .replace("<!-- curves -->", _svg(runs))
        .replace("/* data */ null", embedded)
    )
    replace_file(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))


def _images(runs: list[Run]) -> list[list]:
    """[idx, label, [predict, radius] of each run or None where it has not the image] in the order of idx."""
    logs = [run.log.set_index("idx") for run in runs]
    every = pd.concat([log["label"] for log in logs])
    every = every[~every.index.duplicated()].sort_index()
    columns = [log.reindex(every.index)[["predict", "radius"]].itertuples(index=False) for log in logs]
    return [[idx, label, *(None if np.isnan(found.radius) else [int(found.predict), found.radius] for found in row)]
            for idx, label, *row in zip(every.index.tolist(), every.tolist(), *columns, strict=True)]  # fmt: skip


def _svg(runs: list[Run]) -> str:
    file = io.StringIO()
    plots.curves(runs).savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
