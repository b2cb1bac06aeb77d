"""The table of certification runs.

runs -> summary -> text (spacte.logs.table)
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from spacte.logs.certified import SAME_RADIUS
from spacte.logs.certlog import Radii, certified_radius
from spacte.logs.description import DESCRIPTION
from spacte.logs.table import TEXTS, as_text, radius_names, summary_row, summary_table, table_radii
from spacte.report.comparable import comparable_groups, rows_of
from spacte.report.recount import draws_of
from spacte.report.run import Run
from spacte.utils import UserError

_MOST_CLASSES = 20  # that a table has a column each for


def reached_radii(runs: list[Run]) -> np.ndarray:
    """Those of `table_radii` above 0 that some image of some run reaches, and those that sequential runs decided."""
    limit = max(float(certified_radius(run.log).max()) for run in runs)
    usual = table_radii(limit, runs[0].dataset, runs[0].norm)[1:]
    decided = np.concatenate([run.decided_radii for run in runs])
    beside = decided[(decided > 0) & (np.abs(decided[:, None] - usual) > SAME_RADIUS).all(axis=1) & (decided <= limit)]
    return np.unique(np.concatenate([usual, beside]))


def summary(runs: list[Run], radii: Radii) -> pd.DataFrame:
    """A row per run, see `summary_table`; rows of one `group` were certified alike, see `comparable_groups`."""
    rows = []
    for run, group in zip(runs, comparable_groups(runs), strict=True):
        row = summary_row(run, run.log, radii, group, run.title, draws_of(run), run.name)
        rows.append(row | {"defence": run.defence or run.method or None})
    return summary_table(rows)


def over_seeds(runs: list[Run], radii: Radii) -> pd.DataFrame:
    """A summary with one row for all runs of one experiment: the means over them.

    In place of SE stands SD, the standard deviation of the runs' ACRs (n - 1 in the denominator); none where there is
    one run. Raises UserError if its runs differ by more than their seed, see `check_seeds`.
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


def envelope(table: pd.DataFrame, radii: Radii) -> pd.DataFrame:
    """The summary and, after it, each method's best over sigma at each radius.

    A method is a defence, architecture, number of heads and certificate; with one run it has no such row. Its runs are
    networks of several sigmas, or one network certified at several. ACR belongs to one sigma and is left out; images
    and group are those of the runs where they share them. Raises UserError if a method has two runs of one sigma
    that were trained with the same, or one of unknown sigma.
    """
    method, best = [name for name in DESCRIPTION if name != "sigma"], []
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
        row |= {"stopping": next(iter(sorted(group["stopping"].dropna(), reverse=True)), None)}  # a tolerance first
        names = ["clean", *radius_names(radii, group["norm"].iloc[0])]
        best.append(row | group[names].max(skipna=False).to_dict())  # where a sigma does not tell, nothing is the best
    return pd.concat([table, pd.DataFrame(best)], ignore_index=True).reindex(columns=table.columns)


@dataclass(frozen=True)
class ReportTable:
    """A further table of a report, with what its reader must know; `name` is its key in JSON."""

    name: str
    title: str
    table: pd.DataFrame
    remarks: list[str]
    decimals: int = 3

    def shown(self) -> pd.DataFrame:
        """The table as people read it: without what nothing is known of, or is alike in all rows, or is too much."""
        table = self.table.dropna(axis=1, how="all")
        alike = [name for name in DESCRIPTION if name in table and table[name].nunique(dropna=False) == 1]
        if "norm" in alike and table["norm"].iloc[0] != "l2":
            alike.remove("norm")
        classes = [name for name in table if name.isdecimal()]
        if "radius" in table:  # as it was asked for
            norms = self.table["norm"]
            radii = [radius_names([radius], norm)[0] for radius, norm in zip(table["radius"], norms, strict=True)]
            table = table.assign(radius=radii)
        return table.drop(columns=alike + (classes if len(classes) > _MOST_CLASSES else []))

    def text(self, style: str) -> str:
        """The table and its remarks as markdown or LaTeX; there, the remarks are comments."""
        lines = "".join(f"\n{'% ' if style == 'latex' else ''}{line}" for line in self.remarks)
        return as_text(self.shown(), style, self.decimals) + ("\n" + lines if lines else "")
