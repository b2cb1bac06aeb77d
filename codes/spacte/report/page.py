"""One self-contained HTML page of a report: table, curves, comparisons, every image, configurations."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from spacte.logs.described import DESCRIPTION, printable
from spacte.logs.table import TEXTS, best, records, without_single_group
from spacte.report import plots
from spacte.report.comparison import Comparison
from spacte.report.labels import labels
from spacte.report.recount import votes_of, with_certificate
from spacte.report.run import Run
from spacte.report.table import Part
from spacte.smooth.certificates import CERTIFICATES
from spacte.utils import check_ending, replace_file

ENDINGS = (".html", ".htm")
_TOP_CLASSES = 3  # of an image's votes are on the page
_TEMPLATE = Path(__file__).with_name("page.html")


def write(
    runs: list[Run], table: pd.DataFrame, comparisons: list[Comparison], path: Path, parts: Sequence[Part] = ()
) -> None:
    """Write the page; `table` is the runs' summary, `parts` further tables. UserError where this is not possible."""
    check_ending(path, ENDINGS)
    marks, shared = best(table), _shared(table)
    table = without_single_group(table[["run", *table.columns.drop("run")]]).drop(columns=shared)
    data = {
        "table": {
            "shared": ", ".join(f"{name} {value}" for name, value in shared.items() if value is not None),
            "columns": list(table),
            "texts": TEXTS,
            "rows": [list(row.values()) for row in records(table)],
            "best": marks[table.columns].to_numpy().tolist(),
        },
        "comparisons": [one.record() for one in comparisons],
        "parts": [_part(part) for part in parts],
        "runs": [{"label": label, "log": printable(run.path), "config": run.config and run.config.to_json()}
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


def _shared(table: pd.DataFrame) -> dict[str, str | None]:
    """What a summary's rows have in common, by column: said once it leaves room for the figures; None: not known."""
    alike = [name for name in (*DESCRIPTION, "images") if table[name].nunique(dropna=False) == 1]
    first = table[alike].iloc[0]
    return {name: None if pd.isna(value) else f"{value:g}" if name in ("sigma", "images") else str(value)
            for name, value in first.items()}  # fmt: skip


def _part(part: Part) -> dict:
    """A further table as the page shows it, its run first; `shaded` are the columns that are a heat map."""
    table = part.shown()
    table = table[["run", *table.columns.drop("run")]]
    return {
        "title": part.title,
        "remarks": part.remarks,
        "columns": list(table),
        "texts": [name for name in table if not is_numeric_dtype(table[name])],
        "shaded": [name for name in table if name.isdecimal() or name in ("mean", "smallest")],
        "rows": [list(row.values()) for row in records(table)],
    }


def _images(runs: list[Run]) -> list[list]:
    """[idx, label, what each run says of the image or None where it has not the image] in the order of idx."""
    every = pd.concat([run.log.set_index("idx")["label"] for run in runs])
    every = every[~every.index.duplicated()].sort_index()
    found = [_found(run) for run in runs]
    return [[idx, label, *(one.get(idx) for one in found)] for idx, label in every.items()]


def _found(run: Run) -> dict[int, list]:
    """[predict, radius] by idx; where the counts tell, also both certificates' radii and the top classes' votes."""
    log: dict[int, list] = {row.idx: [int(row.predict), float(row.radius)] for row in run.log.itertuples()}
    votes = votes_of(run)
    if votes is not None:
        radii = [with_certificate(run, kind).log["radius"].tolist() for kind in CERTIFICATES]
        for idx, one, *both in zip(log, votes, *radii, strict=True):
            top = [int(k) for k in np.argsort(-one, kind="stable")[:_TOP_CLASSES] if one[k]]
            log[idx] += [both, [[k, int(one[k])] for k in top]]
    return log


def _svg(runs: list[Run]) -> str:
    file = io.StringIO()
    plots.curves(runs).savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
