"""Certification logs read together: what is known of each, and the table of their figures.

log files -> runs -> summary -> text
"""

import itertools
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from spacte.certlog import (
    COLUMNS,
    acr_standard_error,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    first_line,
    read_log,
)
from spacte.core_mhead import ABSTAIN
from spacte.counts import log_table, read_votes
from spacte.data import DATASETS
from spacte.model import ARCHITECTURES
from spacte.runfiles import RunFiles
from spacte.utils import UserError

RADIUS_STEP = 0.25
_MOST_RADII = 100
_RADIUS_STEPS = {"ImageNet": 0.5}
FORMATS = ("markdown", "csv", "latex", "json")
TEXTS = ("defence", "dataset", "arch", "heads", "run")  # the columns of a summary that hold no number
_NEUTRAL = (*TEXTS, "sigma", "images")  # nor is one of these better than another
_DESCRIPTION = ("defence", "dataset", "arch", "heads", "sigma")


@dataclass(frozen=True)
class Run:
    """A certification log and what its configuration or else its path says of the classifier (None: neither does).

    `name` is the training run's; where the rest does not tell two runs apart, the file's with its folders.
    """

    name: str
    path: Path
    log: pd.DataFrame
    defence: str | None
    dataset: str | None
    arch: str | None
    heads: str | None
    sigma: float | None
    config: dict | None


# --- reading ---------------------------------------------------------------------------------------------------------


def read_runs(paths: list[Path], heads: bool = False) -> list[Run]:
    """The runs of logs and of all certification logs in folders, in the order of a table.

    `heads` adds each head alone, from the vote counts beside a log of several heads. Raises UserError that names the
    file, and the line where there is one: an unreadable log, two data sets, images with two labels.
    """
    logs = list({log.resolve(): log for path in paths for log in _logs_in(path)}.values())
    runs = []
    for path in logs:
        run = Run(re.sub(r"-certify-skip-\d+", "", _parts(path)[-1]), path, read_log(path), **_description(path))
        runs += [*(_heads_alone(run) if heads else ()), run]
    check_same_images(runs)
    described = [(run.name, *(getattr(run, name) for name in _DESCRIPTION)) for run in runs]
    if len(set(described)) < len(runs):
        places = dict(zip(logs, _differing(logs), strict=True))
        runs = [replace(run, name=f"{run.name} ({places[run.path]})") for run in runs]
    return sorted(runs, key=_order)


def _logs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = []
    for log in sorted(path.rglob("*")):
        if log.is_file() and os.access(log, os.R_OK):
            with open(log, errors="replace") as file:
                is_ours, has_rows = set(COLUMNS[:-1]) <= set(file.readline(1000).split()), bool(file.readline(1000))
            if is_ours and has_rows:
                found.append(log)
            elif is_ours:
                warnings.warn(f"'{log}' has no row yet: left out", stacklevel=2)
    if not found:
        raise UserError(f"folder '{path}' holds no certification log")
    return found


def _differing(paths: list[Path]) -> list[str]:
    """The parts of each path, innermost last, in which the paths are not all the same."""
    parts = [_parts(path)[::-1] for path in paths]
    places = [place for place, found in enumerate(itertools.zip_longest(*parts)) if len(set(found)) > 1]
    return ["/".join(part[place] for place in reversed(places) if place < len(part)) for part in parts]


def _description(path: Path) -> dict:
    from_path = {
        "defence": _part(path, r"\d([A-Z]\w+)", str),
        "dataset": _known(path, DATASETS),
        "arch": _known(path, ARCHITECTURES),
        "heads": _part(path, r"h-(\d+)-.*", str),
        "sigma": _part(path, r"(?:noise|sigma)[-_](\d+(?:\.\d+)?)", float),
    }
    files = RunFiles(path)
    if not files.json.exists():
        return from_path | {"config": None}
    try:
        config = files.read_json()["config"]
        heads = "+".join(map(str, config["num_heads"]))
        return {
            "defence": config.get("defence") or from_path["defence"],
            "dataset": config["dataset"],
            "arch": config["arch"],
            "heads": heads if config["head"] is None else f"head {config['head']} of {heads}",
            "sigma": config["noise_sd"],
            "config": config,
        }
    except (UserError, KeyError, TypeError):
        warnings.warn(f"'{files.json}' is no configuration of ours: passed over", stacklevel=2)
        return from_path | {"config": None}


def _part(path: Path, pattern: str, kind: Callable):
    """What the pattern's group finds in the innermost part of the path that is like it."""
    for part in reversed(_parts(path)):
        match = re.fullmatch(pattern, part)
        if match:
            return kind(match[1])
    return None


def _parts(path: Path) -> tuple[str, ...]:
    """The path's folders and its name without .log; a name like sigma_0.25 has no ending to lose."""
    return (*path.absolute().parts[:-1], path.name.removesuffix(".log"))


def _known(path: Path, names) -> str | None:
    """The one of the names that is a part of the path, or a part of a part between hyphens (CIFAR10-R110)."""
    known = {name.lower(): name for name in names}
    for part in reversed(_parts(path)[:-1]):
        for word in part.lower().split("-"):
            if word in known:
                return known[word]
    return None


def _heads_alone(run: Run) -> list[Run]:
    files = RunFiles(run.path)
    if run.heads == "1" or (run.heads or "").startswith("head"):
        return []
    if not files.counts.exists():
        warnings.warn(f"no vote counts lie beside '{run.path}': its heads alone are left out", stacklevel=2)
        return []
    config, votes = files.read_json()["config"], read_votes(files.counts)
    if config["skip_wrong"]:
        raise UserError(f"'{run.path}' was made with --skip_wrong: the heads alone were not counted on every image")
    if [one.idx for one in votes] != run.log["idx"].tolist():
        raise UserError(f"'{files.counts}' holds other images than '{run.path}'")
    alone = []
    for head in range(len(votes[0].selection) - 1):
        log = log_table(votes, config | {"head": head})
        alone.append(replace(run, log=log, heads=f"head {head} of {run.heads}"))
    return alone


def check_same_images(runs: list[Run]) -> None:
    """UserError that names file and line where the runs are about two data sets, or an image has two labels."""
    first: dict[int, tuple[int, Run]] = {}
    known = [run for run in runs if run.dataset]
    for run in runs:
        if known and run.dataset and run.dataset != known[0].dataset:
            there = f"'{known[0].path}', line 1: about {known[0].dataset}"
            raise UserError(f"two data sets in one report: '{run.path}', line 1: about {run.dataset}; {there}")
        earlier = run.log["idx"].map(lambda idx: first[idx][0] if idx in first else np.nan)
        other = earlier.notna() & (earlier != run.log["label"])
        if other.any():
            row = run.log[other].iloc[0]
            label, there = first[row["idx"]]
            raise UserError(
                f"two data sets in one report: '{run.path}', line {first_line(other)}: idx {row['idx']} has label "
                f"{row['label']}, but {label} in '{there.path}'"
            )
        for idx, label in zip(run.log["idx"], run.log["label"], strict=True):
            first.setdefault(idx, (label, run))


def _order(run: Run) -> tuple:
    texts = (run.dataset or "", run.arch or "", run.sigma or 0.0, run.defence or "")
    return (*texts, "head" not in (run.heads or ""), len(run.heads or ""), run.heads or "", run.name)


def labels(runs: list[Run]) -> list[str]:
    """A short name for each run of a picture or a sentence: what is known of it, and where its log lies in a tie."""
    short = []
    for run in runs:
        heads = run.heads and (run.heads if "head" in run.heads else f"{run.heads} head{'s' * (run.heads != '1')}")
        parts = [run.defence, heads, run.sigma and f"sigma {run.sigma:g}"]
        for name in ("arch", "dataset"):
            if len({getattr(other, name) for other in runs}) > 1:
                parts.append(getattr(run, name))
        short.append(", ".join(part for part in parts if part))
    for text in set(short):
        tied = [number for number, other in enumerate(short) if other == text]
        if len(tied) > 1 or not text:
            places = _differing([runs[number].path for number in tied])
            for number, place in zip(tied, places, strict=True):
                short[number] = f"{text} ({place})" if text else place or runs[number].name
    return short


# --- figures ---------------------------------------------------------------------------------------------------------


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
    """A row a run: what it is, images, abstained, clean (accuracy), ACR, its standard error, certified accuracies.

    All shares lie in [0, 1]; the columns of the certified accuracies are the radii as text.
    """
    rows = []
    for run in runs:
        row = {name: getattr(run, name) for name in _DESCRIPTION}
        row |= {"images": len(run.log), "abstained": float((run.log["predict"] == ABSTAIN).mean())}
        row |= {"clean": float(certified_accuracy(run.log, [0])[0]), "ACR": average_certified_radius(run.log)}
        row |= {"SE": acr_standard_error(run.log)}
        row |= dict(zip(radius_names(radii), certified_accuracy(run.log, radii).tolist(), strict=True))
        rows.append(row | {"run": run.name})
    return pd.DataFrame(rows)


def radius_names(radii) -> list[str]:
    """The columns of the certified accuracies at these radii."""
    return [f"{radius:.10g}" for radius in radii]


def envelope(table: pd.DataFrame, radii) -> pd.DataFrame:
    """The summary and, after it, for each method (defence, architecture, heads) the best over sigma at each radius.

    A method with one run has no such row. ACR belongs to one sigma and is left out. Raises UserError where a method has
    two runs of one sigma, or one of unknown sigma.
    """
    method, best = ["defence", "dataset", "arch", "heads"], []
    for _, group in table.groupby(method, dropna=False, sort=False):
        if len(group) == 1:
            continue
        if group["sigma"].isna().any():
            raise UserError(f"--envelope: the sigma of '{group['run'][group['sigma'].isna()].iloc[0]}' is not known")
        twice = group["sigma"].duplicated(keep=False)
        if twice.any():
            one, other = group["run"][twice].iloc[:2]
            raise UserError(f"--envelope: '{one}' and '{other}' are one method at one sigma: leave one of them out")
        row = {name: group[name].iloc[0] for name in method} | {"run": "best over sigma"}
        if group["images"].nunique() == 1:
            row["images"] = group["images"].iloc[0]
        best.append(row | group[["clean", *radius_names(radii)]].max().to_dict())
    return pd.concat([table, pd.DataFrame(best)], ignore_index=True).reindex(columns=table.columns)


# --- text ------------------------------------------------------------------------------------------------------------


def render(table: pd.DataFrame, style: str) -> str:
    """A summary as markdown, LaTeX (booktabs) or CSV.

    Markdown and LaTeX have three decimals, mark the best of each column and leave out what nothing is known of; CSV has
    every digit.
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
    """Any table as markdown, with three decimals."""
    return table.to_markdown(index=False, floatfmt=".3f")


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a summary are the best of their column to three decimals, booleans; none where all are equal."""
    marks = pd.DataFrame(False, index=table.index, columns=table.columns)
    for name in table.columns.drop([*_NEUTRAL, "SE"]):
        shown = table[name].astype(float).round(3)
        marks[name] = (shown == (shown.min() if name == "abstained" else shown.max())) & (shown.nunique() > 1)
    return marks


def _cells(table: pd.DataFrame, bold: str) -> pd.DataFrame:
    """The cells as they are read, without the columns of which nothing is known."""
    cells, marks = {}, best(table)
    for name, column in table.drop(columns="SE").items():
        if name in _NEUTRAL:
            if column.notna().any():
                cells[name] = column.map(lambda value: value if isinstance(value, str) else f"{value:g}")
        else:
            texts = column.astype(float).map("{:.3f}".format)
            if name == "ACR":
                texts += table["SE"].map(" ± {:.3f}".format)
            cells[name] = texts.mask(marks[name], texts.map(bold.format))
    return pd.DataFrame(cells).mask(table.isna(), "-")


def latex(text: str) -> str:
    """The text with the signs that LaTeX would read escaped."""
    signs = {sign: f"\\{sign}" for sign in "_%&#${}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
    return text.translate(str.maketrans(signs))
