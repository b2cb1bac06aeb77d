"""The table of certification runs: their figures, and the same as text.

runs -> summary -> text
"""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spacte.logs.certlog import acr_standard_error, average_certified_radius, certified_accuracy, certified_radius
from spacte.report.alike import comparable_groups, rows_of
from spacte.report.run import DESCRIPTION, Run
from spacte.smooth.certificates import ABSTAIN
from spacte.utils import UserError

RADIUS_STEP = 0.25
_MOST_RADII = 100
_MOST_CLASSES = 20  # that a table has a column each for
_RADIUS_STEPS = {"ImageNet": 0.5}
FORMATS = ("markdown", "csv", "latex", "json")
TEXTS = ("defence", "dataset", "arch", "heads", "certificate", "run")  # the columns of a summary that hold no number
_NEUTRAL = (*TEXTS, "sigma", "trained", "images", "group", "SE", "SD")  # nor is one of these better than another


def table_radii(limit: float, dataset: str | None = None) -> np.ndarray:
    """The radii of a table: 0, step, 2 step, ... up to `limit`; the step is the data set's."""
    step = _RADIUS_STEPS.get(dataset, RADIUS_STEP)
    return step * np.arange(int(limit / step) + 1)


def reached_radii(runs: list[Run]) -> np.ndarray:
    """Those of `table_radii` above 0 that some image of some run reaches. UserError where they are more than 100."""
    limit = max(float(certified_radius(run.log).max()) for run in runs)
    if limit > _MOST_RADII * RADIUS_STEP:
        raise UserError(f"a radius of {limit:g} would make a table of more than {_MOST_RADII} columns: give --radii")
    return table_radii(limit, runs[0].dataset)[1:]


def summary(runs: list[Run], radii) -> pd.DataFrame:
    """A row per run: what it is, images, group, abstained, clean (accuracy), ACR, its error, certified accuracies.

    `trained`, the sigma of training, is there where a run was certified at another. All shares lie in [0, 1]; the
    columns of the certified accuracies are the radii as text. Rows of one `group` were certified alike, see
    `comparable_groups`.
    """
    rows = []
    for run, group in zip(runs, comparable_groups(runs), strict=True):
        row = {name: getattr(run, name) for name in DESCRIPTION}
        row["defence"] = run.defence or run.method or None
        row["trained"] = run.trained
        row |= {"images": len(run.log), "group": group}
        row |= {"abstained": float((run.log["predict"] == ABSTAIN).mean())}
        row |= {"clean": float(certified_accuracy(run.log, [0])[0]), "ACR": average_certified_radius(run.log)}
        row |= {"SE": acr_standard_error(run.log)}
        row |= dict(zip(radius_names(radii), certified_accuracy(run.log, radii).tolist(), strict=True))
        rows.append(row | {"run": run.title})
    table = pd.DataFrame(rows)
    elsewhere = table["trained"].notna() & (table["trained"] != table["sigma"])
    return table if elsewhere.any() else table.drop(columns="trained")


def over_seeds(runs: list[Run], radii) -> pd.DataFrame:
    """A summary with one row for all runs of one experiment: the means over them.

    In place of SE stands SD, the standard deviation of the runs' ACRs (n - 1 in the denominator); none where there is
    one run. Raises UserError where its runs differ by more than their seed, see `check_seeds`.
    """
    table, rows = summary(runs, radii), []
    place = {id(run): number for number, run in enumerate(runs)}
    for name, some in rows_of(runs, over_seeds=True):
        group = table.loc[[place[id(run)] for run in some]]
        row = group.iloc[0].to_dict() | group.drop(columns=[*TEXTS, "sigma"]).mean().to_dict()
        row |= {column: group[column].iloc[0] for column in ("images", "group")}
        row |= {"defence": None} if group["defence"].nunique() > 1 else {}
        rows.append(row | {"SE": group["ACR"].std(), "run": name})
    return pd.DataFrame(rows, columns=table.columns).rename(columns={"SE": "SD"})


def radius_names(radii) -> list[str]:
    """The columns of the certified accuracies at these radii."""
    return [f"{radius:.10g}" for radius in radii]


def envelope(table: pd.DataFrame, radii) -> pd.DataFrame:
    """The summary and, after it, each method's best over sigma at each radius.

    A method is a defence, architecture, number of heads and certificate; with one run it has no such row. Its runs are
    networks of several sigmas, or one network certified at several. ACR belongs to one sigma and is left out; images
    and group are those of the runs where they share them. Raises UserError where a method has two runs of one sigma
    that were trained with the same, or one of unknown sigma.
    """
    method, best = ["defence", "dataset", "arch", "heads", "certificate"], []
    for _, group in table.groupby(method, dropna=False, sort=False):
        if len(group) == 1:
            continue
        if group["sigma"].isna().any():
            raise UserError(f"--envelope: the sigma of '{group['run'][group['sigma'].isna()].iloc[0]}' is not known")
        twice = group.duplicated(subset=[name for name in ("sigma", "trained") if name in group], keep=False)
        if twice.any():
            one, other = group["run"][twice].iloc[:2]
            raise UserError(f"--envelope: '{one}' and '{other}' are one method at one sigma: leave one of them out")
        row = {name: group[name].iloc[0] for name in method} | {"run": "best over sigma"}
        row |= {name: group[name].iloc[0] for name in ("images", "group") if group[name].nunique() == 1}
        best.append(row | group[["clean", *radius_names(radii)]].max().to_dict())
    return pd.concat([table, pd.DataFrame(best)], ignore_index=True).reindex(columns=table.columns)


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
    alignment = ["left" if name in TEXTS else "right" for name in cells]
    return cells.to_markdown(index=False, disable_numparse=True, colalign=alignment)


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


@dataclass(frozen=True)
class Part:
    """A further table of a report, with what its reader must know; `name` is its key in JSON."""

    name: str
    title: str
    table: pd.DataFrame
    remarks: list[str]

    def shown(self) -> pd.DataFrame:
        """The table as people read it: without what nothing is known of, or is alike in all rows, or is too much."""
        table = self.table.dropna(axis=1, how="all")
        alike = [name for name in DESCRIPTION if name in table and table[name].nunique(dropna=False) == 1]
        classes = [name for name in table if name.isdecimal()]
        return table.drop(columns=alike + (classes if len(classes) > _MOST_CLASSES else []))

    def text(self, style: str) -> str:
        """The table and its remarks as markdown or LaTeX; there, the remarks are comments."""
        lines = "".join(f"\n{'% ' if style == 'latex' else ''}{line}" for line in self.remarks)
        return plain(self.shown(), style) + ("\n" + lines if lines else "")


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
    return text.translate(str.maketrans(signs))
