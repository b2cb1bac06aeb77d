"""The runs of logs and folders, in the order of a table, and their short names."""

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

from spacte.logs.certlog import COLUMNS, beginning, read_log
from spacte.logs.runfiles import RunFiles
from spacte.report.alike import check_same_images
from spacte.report.run import Run, description, differing_parts, method_parts, parts_of
from spacte.report.votes import heads_alone, with_certificate
from spacte.utils import UserError

_OTHER_KINDS = {"attack": "an attack log", "predict": "a prediction log"}


def read_runs(paths: list[Path], heads: bool = False, certificate: str | None = None) -> list[Run]:
    """The runs of logs and of all certification logs in folders, in the order of a table.

    In a folder, attack and prediction logs are passed over. `heads` adds each head alone, from the vote counts beside a
    log of several heads; `certificate` makes all logs again from their counts. Raises UserError that names the file,
    and the line where there is one: an unreadable log, counts that are missing, a path to an attack or prediction log,
    two data sets, images with two labels.
    """
    logs = list({log.resolve(): log for path in paths for log in _logs_in(path)}.values())
    runs = []
    for path in logs:
        name, known = re.sub(r"-certify-skip-\d+", "", parts_of(path)[-1]), description(path)
        if known["config"] is not None:  # which says what the certificate is; the row may be of another
            name = name.removesuffix("-all-votes")
        run = Run(name, path, read_log(path), **known)
        if certificate is not None:
            run = with_certificate(run, certificate)
        runs += [*(heads_alone(run) if heads else ()), run]
    check_same_images(runs)
    places = _places([run.described for run in runs], runs)
    runs = [replace(run, place=place) for run, place in zip(runs, places, strict=True)]
    return sorted(_with_methods(runs), key=_order)


def _with_methods(runs: list[Run]) -> list[Run]:
    """The runs, those of an unknown defence with the folders in which they differ: cat-rs/noise_0.25, cohen/..."""
    unknown = [run for run in runs if run.defence is None]
    methods = map(method_parts, differing_parts([run.path.parent for run in unknown]) if unknown else ())
    named = {id(run): method for run, method in zip(unknown, methods, strict=True)}
    return [replace(run, method=named.get(id(run), "")) for run in runs]


def _places(names: list, runs: list[Run]) -> list[str]:
    """For each run whose name another has too, in what the paths of their logs differ; "" for the others."""
    places = [""] * len(runs)
    for name in set(names):
        tied = [number for number, other in enumerate(names) if other == name]
        for number, place in zip(tied, differing_parts([runs[number].path for number in tied]), strict=True):
            places[number] = place
    return places


def _logs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        kind = _kind(path)
        if kind != "certify":
            raise UserError(f"'{path}' is {_OTHER_KINDS[kind]}: give a certification log")
        return [path]
    found = []
    for log in sorted(path.rglob("*")):
        if log.is_file() and os.access(log, os.R_OK):
            header, has_rows = _beginning(log)
            if set(COLUMNS[:-1]) <= header and _kind(log) == "certify":
                if has_rows:
                    found.append(log)
                else:
                    warnings.warn(f"'{log}' has no row yet: left out", stacklevel=2)
    if not found:
        raise UserError(f"folder '{path}' holds no certification log")
    return found


def _beginning(log: Path) -> tuple[set[str], bool]:
    """The columns that a file's first line names, and whether there is a second line."""
    encoding, header = beginning(log)
    with open(log, encoding=encoding, errors="replace") as file:
        file.readline(1000)
        return set(re.split(r"[\s,]+", header[:1000])), bool(file.readline(1000))


def _kind(log: Path) -> str:
    """What the configuration beside a log says it is, or else its columns: "certify", "attack" or "predict".

    A file that is none of them is "certify": its reader says what is wrong with it.
    """
    try:
        kind = RunFiles(log).read_json()["config"]["kind"]
        if kind == "certify" or kind in _OTHER_KINDS:
            return kind
    except (UserError, KeyError, TypeError):
        pass  # not a configuration of ours: the columns tell
    try:
        columns, _ = _beginning(log)
    except OSError:
        return "certify"
    if "attack_radius" in columns:
        return "attack"
    return "predict" if {"idx", "predict", "correct"} <= columns and "radius" not in columns else "certify"


def _order(run: Run) -> tuple:
    texts = (run.dataset or "", run.arch or "", run.sigma or 0.0, run.defence or "")
    return (*texts, "head" not in (run.heads or ""), len(run.heads or ""), run.heads or "", run.title)


def labels(runs: list[Run]) -> list[str]:
    """A short name for each run of a picture or a sentence: what is known of it, and where its log lies in a tie."""
    short = []
    for run in runs:
        heads = run.heads and heads_in_words(run)
        parts = [run.defence, heads, *run.variant, run.sigma and f"sigma {run.sigma:g}"]
        for name in ("arch", "dataset", "certificate"):
            if len({getattr(other, name) for other in runs}) > 1:
                parts.append(getattr(run, name))
        short.append(", ".join(part for part in parts if part))
    places = _places(short, runs)
    for number, (text, place) in enumerate(zip(short, places, strict=True)):
        short[number] = f"{text} ({place})" if text and place else text or place or runs[number].title
    return short


def heads_in_words(run: Run) -> str:
    """1 head, 5 heads, 5 networks (of one head each), 5+1 heads, 5 heads by consensus of 2, head 0 of 5."""
    heads = run.heads or "unknown heads"
    if "head" in heads:
        return heads
    number, space, rule = heads.partition(" ")
    if "+" in number and set(number.split("+")) == {"1"}:
        return f"{number.count('1')} networks{space}{rule}"
    return f"{number} head{'s' * (number != '1')}{space}{rule}"
