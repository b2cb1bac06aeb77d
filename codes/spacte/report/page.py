"""One self-contained HTML page of a report: what it is about, curves, tables, every image, configurations."""

import io
import itertools
import json
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from spacte.logs.description import DESCRIPTION
from spacte.logs.table import TEXTS, best, lower_bounds, radius_decimals, readable, records, stopping_remark
from spacte.report import plots
from spacte.report.comparison import Comparison
from spacte.report.labels import labels
from spacte.report.recount import recertify, votes_of
from spacte.report.run import Run
from spacte.report.table import ReportTable
from spacte.smooth.certificates import CERTIFICATES
from spacte.utils import listed

ENDINGS = (".html", ".htm")
_TOP_CLASSES = 3  # of an image's votes are on the page
_TEMPLATE = Path(__file__).with_name("page.html")
_INK = "#010203"  # stands for the page's own colour of text, which is another one in the dark


def html(
    rows: list[list[Run]], table: pd.DataFrame, comparisons: list[Comparison], parts: Sequence[ReportTable] = (),
    remarks: Sequence[str] = (),
) -> str:  # fmt: skip
    """The page of a table whose rows are `rows`, runs or the seeds of experiments; `parts` are further tables.

    It holds no path of the machine that wrote it.
    """
    runs = [run for some in rows for run in some]
    keys, names = _keys(len(rows)), labels(rows)
    numbers = iter(range(len(runs)))
    data = {
        "heading": _heading(runs),
        "rows": [
            {"key": key, "label": label, "name": some[0].name, "runs": [next(numbers) for _ in some]}
            for key, label, some in zip(keys, names, rows, strict=True)
        ],
        "table": _summary(table, rows) | {"remark": " ".join([*remarks, stopping_remark(table)])},
        "comparisons": _comparisons(comparisons),
        "parts": [_part(part, dict(zip(table["run"], names, strict=False))) for part in parts if not part.table.empty],
        "runs": [
            {"label": label, "name": run.name, "config": run.config and _shareable(run.config.to_json())}
            for label, run in zip(labels([[run] for run in runs]), runs, strict=True)
        ],
        "images": _images(runs),
        "decimals": radius_decimals(runs[0].norm),
    }
    embedded = json.dumps(data).replace("<", "\\u003c")  # no text of a log can end the script
    template = _TEMPLATE.read_text(encoding="utf-8")
    return template.replace("<!-- curves -->", _svg(rows)).replace("/* data */ null", embedded)


def _keys(count: int) -> list[str]:
    """A, B, ..., Z, AA, AB, ...: what a row is called where its label has no room."""
    lengths = (itertools.product(string.ascii_uppercase, repeat=length) for length in itertools.count(1))
    return ["".join(key) for key in itertools.islice(itertools.chain.from_iterable(lengths), count)]


def _heading(runs: list[Run]) -> dict[str, Any]:
    """What the page is about: a title, and what all runs have in common or in what they differ, in words."""

    def said(name: str, values: Iterable[object], text: Callable[[Any], str] = str) -> str:
        known = list(dict.fromkeys(value for value in values if value is not None))
        return f"{name} {listed(map(text, known), most=6)}".strip() if known else ""

    configs = [run.config for run in runs if run.config]

    def setting(name: str) -> list[object]:
        return [getattr(config, name) for config in configs if name not in config.lacking]

    images = [list(run.log["idx"]) for run in runs]
    facts = [
        said("", (run.dataset for run in runs)),
        said("", (run.arch for run in runs)),
        said("sigma", (run.sigma for run in runs), lambda sigma: f"{sigma:g}"),
        said("N0", setting("N0"), lambda n: f"{n:,}"),
        said("N", setting("N"), lambda n: f"{n:,}"),
        said("alpha", setting("alpha"), lambda alpha: f"{alpha:g}"),
        said("certificate", (run.certificate for run in runs)),
        said("radii in", (run.norm for run in runs), str.capitalize),
        said("images", sorted({len(one) for one in images})) + _which(images),
        "perhaps not the same images: several data_sha256" * (len({*setting("data_sha256")} - {""}) > 1),
    ]
    title = ", ".join(filter(None, (*facts[:1], *facts[2:3])))
    return {"title": title, "facts": [fact for fact in facts if fact]}


def _which(images: list[list[int]]) -> str:
    """Which images these are, where all runs have the same, in equal steps."""
    steps = set(np.diff(sorted(images[0])).tolist())
    if len({frozenset(one) for one in images}) > 1 or len(steps) != 1:
        return ""
    return f" (one in {steps.pop()})" if steps != {1} else ""


def _summary(table: pd.DataFrame, rows: list[list[Run]]) -> dict[str, Any]:
    """The summary as the page shows it; `rows` are those of the page, behind which a best over sigma may stand."""
    marks, shared = best(table), _shared(table)
    shown = readable(table)
    shown = shown[["run", *shown.columns.drop("run")]].drop(columns=[name for name in shared if name in shown])
    shown = shown.dropna(axis=1, how="all")
    return {
        "columns": list(shown),
        "texts": TEXTS,
        "rows": [list(row.values()) for row in records(shown)],
        "best": marks[shown.columns].to_numpy().tolist(),
        "bounds": lower_bounds(table)[shown.columns].to_numpy().tolist(),
        "keyed": len(rows),
    }


def _shared(table: pd.DataFrame) -> list[str]:
    """The columns in which a summary's rows are alike: what the heading says."""
    return [name for name in (*DESCRIPTION, "images") if table[name].nunique(dropna=False) == 1]


def _comparisons(comparisons: list[Comparison]) -> dict[str, Any]:
    """All comparisons as one table: a row each, with the difference and its interval in each figure's column."""
    figures = list(dict.fromkeys(name for one in comparisons for name in one.table["figure"]))
    figures = [name for name in figures if name in ("ACR", "clean")] + [
        name for name in figures if name not in ("ACR", "clean")
    ]
    rows = []
    for one in comparisons:
        found = {row["figure"]: row for row in records(one.table)}
        rows.append({"a": one.a, "b": one.b, "images": one.images, "figures": [found.get(name) for name in figures]})
    return {"figures": figures, "rows": rows, "sentences": [one.sentences() for one in comparisons]}


def _part(part: ReportTable, called: dict[str, str]) -> dict[str, Any]:
    """A further table as the page shows it, its run first and as it is `called` in the first table; `shaded` are the
    columns that are a heat map.
    """
    table = part.shown()
    table = table.assign(run=[called.get(name, name) for name in table["run"]])
    table = table[["run", *table.columns.drop("run")]]
    return {
        "title": part.title,
        "remarks": part.remarks,
        "columns": list(table),
        "texts": [name for name in table if not is_numeric_dtype(table[name])],
        "shaded": [name for name in table if name.isdecimal() or name in ("mean", "smallest")],
        "rows": [list(row.values()) for row in records(table)],
        "decimals": part.decimals,
    }


def _shareable(value: Any) -> Any:
    """A configuration without a path of this machine: of an absolute one, the name alone."""
    if isinstance(value, dict):
        return {name: _shareable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_shareable(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


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
        radii = [recertify(run, kind).log["radius"].tolist() for kind in CERTIFICATES]
        for idx, one, *both in zip(log, votes, *radii, strict=True):
            top = [int(k) for k in np.argsort(-one, kind="stable")[:_TOP_CLASSES] if one[k]]
            log[idx] += [both, [[k, int(one[k])] for k in top]]
    return log


def _svg(rows: list[list[Run]]) -> str:
    import matplotlib  # a second to import, which a table does not need

    file = io.StringIO()
    with matplotlib.rc_context(
        {"text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    ):
        plots.curves(rows).savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue().replace(_INK, "currentColor").replace("#000000", "currentColor")
    return text[text.index("<svg") :]
