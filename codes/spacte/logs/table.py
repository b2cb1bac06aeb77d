"""The figures of certification logs as rows of a table, and tables as text."""

import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from spacte.logs.certlog import Radii, acr_standard_error, average_certified_radius, certified_accuracy
from spacte.logs.described import Description
from spacte.smooth.certificates import ABSTAIN

RADIUS_STEP = 0.25
_RADIUS_STEPS = {"ImageNet": 0.5}
FORMATS = ("markdown", "csv", "latex", "json")
TEXTS = ("defence", "dataset", "arch", "heads", "certificate", "run")  # the columns of a summary that hold no number
_NEUTRAL = (*TEXTS, "sigma", "trained", "images", "group", "SE", "SD")  # nor is one of these better than another


def table_radii(limit: float, dataset: str | None = None) -> np.ndarray:
    """The radii of a table: 0, step, 2 step, ... up to `limit`; the step is the data set's."""
    step = _RADIUS_STEPS.get(dataset or "", RADIUS_STEP)
    return step * np.arange(int(limit / step) + 1)


def radius_names(radii: Iterable[float]) -> list[str]:
    """The columns of the certified accuracies at these radii."""
    return [f"{radius:.10g}" for radius in radii]


def summary_row(known: Description, log: pd.DataFrame, radii: Radii, group: int, run: str) -> dict:
    """What a summary says of a certification log: see `summary_table`."""
    return known.facts | {
        "trained": known.trained,
        "images": len(log),
        "group": group,
        "abstained": float((log["predict"] == ABSTAIN).mean()),
        "clean": float(certified_accuracy(log, [0])[0]),
        "ACR": average_certified_radius(log),
        "SE": acr_standard_error(log),
        **dict(zip(radius_names(radii), certified_accuracy(log, radii).tolist(), strict=True)),
        "run": run,
    }


def summary_table(rows: list[dict]) -> pd.DataFrame:
    """A row per log: what it is, images, group, abstained, clean (accuracy), ACR, its error, certified accuracies, run.

    `trained`, the sigma of training, is there where a classifier was certified at another. All shares lie in [0, 1];
    the columns of the certified accuracies are the radii as text. Rows of one `group` were certified alike.
    """
    table = pd.DataFrame(rows)
    elsewhere = table["trained"].notna() & (table["trained"] != table["sigma"])
    return table if elsewhere.any() else table.drop(columns="trained")


# --- text ---


def render(table: pd.DataFrame, style: str) -> str:
    """A summary as markdown, LaTeX (booktabs) or CSV.

    Markdown and LaTeX have three decimals, mark the best of each column within its group (see `best`), and leave out
    what nothing is known of, and the group where there is one; CSV has every digit.
    """
    if style == "csv":
        return table.to_csv(index=False).rstrip("\n")
    if style == "latex":
        cells = _cells(table.assign(run=table["run"].map(latex)), r"\textbf{{{}}}")
        cells = cells.map(lambda text: text.replace(" ± ", r" $\pm$ "))
        alignment = "".join("l" if name in TEXTS else "r" for name in cells)
        return cells.to_latex(index=False, escape=False, column_format=alignment).rstrip("\n")
    cells = _cells(table, "**{}**")
    sides = ["left" if name in TEXTS else "right" for name in cells]
    return cells.to_markdown(index=False, disable_numparse=True, colalign=sides)


def records(table: pd.DataFrame) -> list[dict]:
    """The rows of a summary or a comparison for JSON, None where nothing is known."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def markdown(table: pd.DataFrame) -> str:
    """Any table as markdown; numbers that are not whole have three decimals, "-" stands where there is none."""
    cells = table.astype(object).where(table.notna(), None)
    return cells.to_markdown(index=False, floatfmt=".3f", missingval="-")


def plain(table: pd.DataFrame, style: str) -> str:
    """Any table as markdown or LaTeX, with three decimals."""
    if style == "latex":
        texts = table.map(lambda value: latex(value) if isinstance(value, str) else value).rename(columns=latex)
        return texts.to_latex(index=False, float_format="%.3f", na_rep="-").rstrip("\n")
    return markdown(table)


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a summary are the best of their column and group to three decimals, booleans.

    None in a group whose rows are all equal, and none in a row without a group.
    """
    marks = pd.DataFrame(False, index=table.index, columns=table.columns)
    for name in table.columns.drop(list(_NEUTRAL), errors="ignore"):
        shown = table[name].astype(float).round(3).groupby(table["group"])
        top = shown.transform("min" if name == "abstained" else "max")
        marks[name] = (table[name].astype(float).round(3) == top) & (shown.transform("nunique") > 1)
    return marks


def without_single_group(table: pd.DataFrame) -> pd.DataFrame:
    """A summary as people read it: without its groups where they say no more than the certificates."""
    groups, certificates = (table[name].nunique(dropna=False) for name in ("group", "certificate"))
    return table.drop(columns="group") if groups <= certificates else table


def _cells(table: pd.DataFrame, bold: str) -> pd.DataFrame:
    """The cells as they are read, without the columns of which nothing is known."""
    cells, marks = {}, best(table)
    table = without_single_group(table)
    spread = table["SD" if "SD" in table else "SE"]
    for name, column in table.drop(columns=spread.name).items():
        if name in _NEUTRAL:
            if column.notna().any():
                cells[name] = column.map(lambda value: value if isinstance(value, str) else f"{value:g}")
        else:
            texts = column.astype(float).map("{:.3f}".format)
            if name == "ACR":
                texts += spread.map(lambda value: "" if pd.isna(value) else f" ± {value:.3f}")
            cells[name] = texts.mask(marks[name], texts.map(bold.format))
    return pd.DataFrame(cells).mask(table.isna(), "-")


def latex(text: str) -> str:
    """The text with the signs that LaTeX would read escaped."""
    signs = {sign: f"\\{sign}" for sign in "_%&#${}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
    return text.translate({ord(sign): escaped for sign, escaped in signs.items()})
