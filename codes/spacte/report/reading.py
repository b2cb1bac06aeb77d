"""The runs of logs and folders, in the order of a table."""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from spacte.logs.certlog import COLUMNS, read_table
from spacte.logs.description import check_certification_log, columns_of, description, kind_of, parts_of
from spacte.logs.runfiles import run_name
from spacte.report.comparable import check_same_images, warn_of_other_images
from spacte.report.labels import labelled, natural, with_methods
from spacte.report.recount import heads_alone, recertify
from spacte.report.run import Run
from spacte.utils import UserError


@dataclass(frozen=True)
class ReadOptions:
    """How logs are read: `heads` adds each head alone, from the vote counts beside a log of several heads.

    `certificate` and `top_k` make all logs again from their counts; radii are given in the `norm`.
    """

    heads: bool = False
    certificate: str | None = None
    top_k: int | None = None
    norm: str = "l2"


def read_runs(paths: list[Path], reading: ReadOptions = ReadOptions()) -> list[Run]:
    """The runs of logs and of all certification logs in folders, in the order of a table.

    In a folder, attack and prediction logs are passed over, and the shards of a merged log that holds all their images.
    Raises UserError that names the file, and the line where there is one: an unreadable log, counts that are missing, a
    path to an attack or prediction log, two data sets, images with two labels.
    """
    logs = list({log.resolve(): log for path in paths for log in _logs_in(path)}.values())
    runs = []
    for path in logs:
        known = description(path)
        name = run_name(parts_of(path)[-1], known.config is not None)
        run = Run(name=name, path=path, log=read_table(path), **vars(known))
        if reading.certificate is not None or reading.top_k is not None:
            run = recertify(run, reading.certificate, reading.top_k)
        some = [run, *(heads_alone(run) if reading.heads else ())]
        runs += [one.in_norm(reading.norm) for one in some]
    check_same_images(runs)
    warn_of_other_images(runs)
    runs = with_methods(labelled(runs))
    of_path = {run.path: run for run in reversed(runs)}  # each log's own run, which stands before its heads
    return sorted(runs, key=lambda run: (*_order(of_path[run.path]), run is not of_path[run.path], *_order(run)))


def _logs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        check_certification_log(path)
        return [path]
    found = []
    for log in sorted(path.rglob("*")):
        if log.is_file() and os.access(log, os.R_OK):
            try:
                header, has_rows = columns_of(log)
            except OSError as error:
                warnings.warn(f"'{log}' cannot be read ({error.strerror}): left out", stacklevel=2)
                continue
            if set(COLUMNS[:-1]) <= header and kind_of(log) == "certify":
                if has_rows:
                    found.append(log)
                else:
                    warnings.warn(f"'{log}' has no row yet: left out", stacklevel=2)
    if not found:
        raise UserError(f"folder '{path}' holds no certification log")
    return [log for log in found if not _is_merged(log)]


def _is_merged(log: Path) -> bool:
    """Whether it is a shard's log whose images all stand in the merged log beside it."""
    merged = log.with_name(re.sub(r"-shard-\d+-of-\d+", "", log.name))
    if merged == log or not merged.is_file():
        return False
    try:
        return set(read_table(log)["idx"]) <= set(read_table(merged)["idx"])
    except UserError:
        return False  # who reads it says what is wrong


def _order(run: Run) -> tuple:
    """Like runs together, seeds by number."""
    texts = (run.dataset or "", run.arch or "", run.sigma or 0.0, run.defence or "")
    heads = (run.heads.total, run.heads.networks, run.heads.consensus or 0, run.heads.voter) if run.heads else ()
    return (*texts, heads, natural(run.title), run.certificate or "", str(run.path))
