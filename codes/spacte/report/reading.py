"""The runs of logs and folders, in the order of a table."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

from spacte.logs.certlog import COLUMNS, read_log
from spacte.logs.described import check_certification_log, columns_of, description, kind_of, method_parts, parts_of
from spacte.logs.runfiles import run_name
from spacte.report.comparable import check_same_images
from spacte.report.labels import differing_parts, places
from spacte.report.recount import heads_alone, with_certificate
from spacte.report.run import Run
from spacte.utils import UserError


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
        known = description(path)
        name = run_name(parts_of(path)[-1], known.config is not None)
        run = Run(name=name, path=path, log=read_log(path), **vars(known))
        if certificate is not None:
            run = with_certificate(run, certificate)
        runs += [*(heads_alone(run) if heads else ()), run]
    check_same_images(runs)
    found = places([run.described for run in runs], runs)
    runs = [replace(run, place=place) for run, place in zip(runs, found, strict=True)]
    return sorted(_with_methods(runs), key=_order)


def _with_methods(runs: list[Run]) -> list[Run]:
    """The runs, those of an unknown defence with the folders in which they differ: cat-rs/noise_0.25, cohen/..."""
    unknown = [run for run in runs if run.defence is None]
    methods = map(method_parts, differing_parts([run.path.parent for run in unknown]) if unknown else ())
    named = {id(run): method for run, method in zip(unknown, methods, strict=True)}
    return [replace(run, method=named.get(id(run), "")) for run in runs]


def _logs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        check_certification_log(path)
        return [path]
    found = []
    for log in sorted(path.rglob("*")):
        if log.is_file() and os.access(log, os.R_OK):
            header, has_rows = columns_of(log)
            if set(COLUMNS[:-1]) <= header and kind_of(log) == "certify":
                if has_rows:
                    found.append(log)
                else:
                    warnings.warn(f"'{log}' has no row yet: left out", stacklevel=2)
    if not found:
        raise UserError(f"folder '{path}' holds no certification log")
    return found


def _order(run: Run) -> tuple:
    texts = (run.dataset or "", run.arch or "", run.sigma or 0.0, run.defence or "")
    heads, alone = str(run.heads or ""), run.heads is not None and run.heads.head is not None
    return (*texts, not alone, len(heads), heads, run.title)
