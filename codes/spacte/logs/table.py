"""The figures of certification logs as rows of a table, and tables as text."""

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from spacte.logs.certlog import Radii, acr_standard_error, average_certified_radius, certified_accuracy
from spacte.logs.description import Description
from spacte.smooth.certificates import ABSTAIN

RADIUS_STEP = 0.25
_RADIUS_STEPS = {"ImageNet": 0.5}
_LEVELS = 255  # of a pixel: what Linf radii are counted in
_MOST_RADII, _MOST_LINF_RADII = 32, 12  # that a table has without being asked for them
# the columns of a summary that hold no number
TEXTS = ("defence", "dataset", "arch", "heads", "certificate", "norm", "name", "stopping", "run")
_NEUTRAL = (*TEXTS, "sigma", "trained", "images", "draws", "group", "SE", "SD")  # nor is one of these better


def table_radii(limit: float, dataset: str | None = None, norm: str = "l2") -> np.ndarray:
    """The radii of a table: 0, step, 2 step, ... up to `limit`.

    The step is the data set's, of Linf 1/255, or as often twice that as keeps the table narrow.
    """
    step = 1 / _LEVELS if norm == "linf" else _RADIUS_STEPS.get(dataset or "", RADIUS_STEP)
    while limit / step > (_MOST_LINF_RADII if norm == "linf" else _MOST_RADII):
        step *= 2
    return step * np.arange(int(limit / step) + 1)


def radius_names(radii: Iterable[float], norm: str = "l2") -> list[str]:
    """The columns of the certified accuracies at these radii; 2/255 for such a Linf radius."""
    return [_in_levels(radius) if norm == "linf" else f"{radius:.10g}" for radius in radii]


def _in_levels(radius: float) -> str:
    levels = round(radius * _LEVELS)
    return f"{levels}/{_LEVELS}" if levels and abs(radius * _LEVELS - levels) < 1e-9 else f"{radius:.10g}"


def summary_row(
    known: Description, log: pd.DataFrame, radii: Radii, group: int, run: str, draws: float | None, name: str = ""
) -> dict:
    """A log's row of a summary, see `summary_table`: `run` is what people call it, `name` its name by its flags."""
    accuracies = np.where(known.knows_radii([0.0, *radii]), certified_accuracy(log, [0.0, *radii]), np.nan).tolist()
    return known.facts | {
        "trained": known.trained,
        "name": name or run,
        "images": len(log),
        "draws": draws,
        "stopping": known.stopping,
        "group": group,
        "abstained": np.nan if np.isnan(accuracies[0]) else float((log["predict"] == ABSTAIN).mean()),
        "clean": accuracies[0],
        "ACR": average_certified_radius(log),
        "SE": acr_standard_error(log),
        **dict(zip(radius_names(radii, known.norm), accuracies[1:], strict=True)),
        "run": run,
    }


def summary_table(rows: list[dict]) -> pd.DataFrame:
    """A row per log: what it is, name, images, draws, stopping, group, abstained, clean (accuracy), ACR, its error,
    certified accuracies, run.

    All shares lie in [0, 1]; the columns of the certified accuracies are the radii as text. Rows of one `group` were
    certified alike. `draws` is the mean number of an image's estimation draws. `stopping` says when a sequential run
    ended them: its ACR is a lower bound, and a radius that its rule did not decide has no accuracy (NaN). `trained`,
    the sigma of training, is there where a classifier was certified at another.
    """
    table = pd.DataFrame(rows).astype({"draws": float})
    elsewhere = table["trained"].notna() & (table["trained"] != table["sigma"])
    return table if elsewhere.any() else table.drop(columns="trained")


# --- text ---


def render(table: pd.DataFrame, style: str, remarks: Sequence[str] = ()) -> str:
    """A summary as markdown, LaTeX (booktabs) or CSV, and remarks below it.

    Markdown and LaTeX have three decimals (a Linf ACR five), mark the best of each column within its group (see
    `best`), and leave out columns that are empty or say nothing more (see `readable`); CSV has every column and digit.
    """
    if style == "csv":
        return csv(table)
    lines = [*remarks, *filter(None, [stopping_remark(table)])]
    if style == "latex":
        cells = _escaped(_cells(table, r"\textbf{{{}}}"), latex)
        cells = cells.map(lambda text: text.replace(" ± ", r" $\pm$ ").replace("≥ ", r"$\geq$ "))
        alignment = "".join("l" if name in TEXTS else "r" for name in cells)
        text = cells.to_latex(index=False, escape=False, column_format=alignment).rstrip("\n")
        return text + "".join(f"\n% {line}" for line in lines)
    cells = _escaped(_cells(table, "**{}**"), _in_markdown)
    sides = ["left" if name in TEXTS else "right" for name in cells]
    text = cells.to_markdown(index=False, disable_numparse=True, colalign=sides)
    return text + "\n" * bool(lines) + "".join(f"\n{line}" for line in lines)


def _escaped(cells: pd.DataFrame, escape: Callable[[str], str]) -> pd.DataFrame:
    """With the texts of a summary escaped, which are the users' and strangers'."""
    return cells.assign(**{name: cells[name].map(escape) for name in cells if name in TEXTS})


def _in_markdown(text: str) -> str:
    return text.replace("|", r"\|")


def csv(table: pd.DataFrame) -> str:
    """Any table as CSV with every digit; no text in it is a formula to a spreadsheet."""
    texts = table.map(
        lambda value: f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
    )
    return texts.to_csv(index=False).rstrip("\n")


def stopping_remark(table: pd.DataFrame) -> str:
    """What a reader of a summary must know of its sequential runs; "" where there are none."""
    rules = "; ".join(table["stopping"].dropna().unique())
    if not rules:
        return ""
    return f'--sequential ended draws early ({rules}): "≥" marks a lower bound, "-" a radius that was not decided.'


def records(table: pd.DataFrame) -> list[dict]:
    """The rows of a summary or a comparison for JSON, None where nothing is known."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def markdown(table: pd.DataFrame, decimals: int = 3) -> str:
    """Any table as markdown; "-" stands where there is no number, and decimals where one is not whole."""
    cells = table.map(lambda value: _in_markdown(value) if isinstance(value, str) else value).rename(
        columns=_in_markdown
    )
    cells = cells.astype(object).where(cells.notna(), None)
    texts = [at for at, name in enumerate(table) if name == "radius"]  # not rounded
    return cells.to_markdown(index=False, floatfmt=f".{decimals}f", missingval="-", disable_numparse=texts)


def as_text(table: pd.DataFrame, style: str, decimals: int = 3) -> str:
    """Any table as markdown or LaTeX."""
    if style == "latex":
        texts = table.map(lambda value: latex(value) if isinstance(value, str) else value).rename(columns=latex)
        return texts.to_latex(index=False, float_format=f"%.{decimals}f", na_rep="-").rstrip("\n")
    return markdown(table, decimals)


def radius_decimals(norm: str) -> int:
    """How many decimals a radius has in a text: the Linf norm's are small."""
    return 5 if norm == "linf" else 3


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Booleans: which cells of a summary are the best of their column within their group, rounded as they are shown.

    Nothing is marked where all rows of a group are equal, nor in a row without a group. A lower bound is not marked,
    since the value itself is not known; nor is `abstained`, since one can abstain less by being wrong more often.
    """
    marks = pd.DataFrame(False, index=table.index, columns=table.columns)
    bounds = lower_bounds(table)
    for name in table.columns.drop([*_NEUTRAL, "abstained"], errors="ignore"):
        rounded = table[name].astype(float).round(_decimals_of(name, table)).mask(bounds[name])
        shown = rounded.groupby(table["group"])
        marks[name] = (rounded == shown.transform("max")) & (shown.transform("nunique") > 1)
    return marks


def lower_bounds(table: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a summary are lower bounds, booleans.

    They are the ACRs of sequential runs, and the accuracies of those that know each radius to within a tolerance.
    """
    marks = pd.DataFrame(False, index=table.index, columns=table.columns)
    sequential = table["stopping"].notna()
    within = table["stopping"].fillna("").astype(str).str.startswith("tolerance")
    for name in table.columns.drop([*_NEUTRAL, "abstained"], errors="ignore"):
        marks[name] = table[name].notna() & (sequential if name == "ACR" else within)
    return marks


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A summary as people read it: without the columns that say nothing more.

    These are `name` and `stopping`, which the label and the remarks say; `group` where there are no more groups than
    certificates; `norm` where all radii are L2; `draws` where all runs have the same fixed N.
    """
    groups, certificates = (table[name].nunique(dropna=False) for name in ("group", "certificate"))
    fixed = bool(table["stopping"].isna().all()) and table["draws"].nunique(dropna=False) == 1
    says_nothing = {
        "name": True,
        "stopping": True,
        "group": groups <= certificates,
        "norm": bool((table["norm"] == "l2").all()),
        "draws": fixed,
    }
    return table.drop(columns=[name for name, nothing in says_nothing.items() if nothing])


def _cells(table: pd.DataFrame, bold: str) -> pd.DataFrame:
    """The cells as they are read, without the columns of which nothing is known."""
    cells, marks, bounds, shown = {}, best(table), lower_bounds(table), readable(table)
    spread = shown["SD" if "SD" in shown else "SE"]
    for name, column in shown.drop(columns=spread.name).items():
        if name in _NEUTRAL:
            if column.notna().any():
                number = "{:.0f}" if name == "draws" else "{:g}"
                cells[name] = column.map(
                    lambda value, text=number: value if isinstance(value, str) else text.format(value)
                )
        else:
            digits = _decimals_of(name, table)
            texts = column.astype(float).map(f"{{:.{digits}f}}".format)
            if name == "ACR":
                texts += spread.map(f" ± {{:.{digits}f}}".format).mask(spread.isna(), "")
            texts = texts.mask(bounds[name], "≥ " + texts)
            cells[name] = texts.mask(marks[name], texts.map(bold.format))
    return pd.DataFrame(cells).mask(shown.isna(), "-")


def _decimals_of(name: str, table: pd.DataFrame) -> int:
    return radius_decimals("linf" if name == "ACR" and (table["norm"] == "linf").any() else "l2")


def latex(text: str) -> str:
    """The text with the signs that LaTeX would read escaped."""
    signs = {sign: f"\\{sign}" for sign in "_%&#${}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
    return text.translate({ord(sign): escaped for sign, escaped in signs.items()})
