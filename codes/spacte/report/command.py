"""The command line of report.py: flags -> runs -> table, comparisons, pictures, page."""

import itertools
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from spacte import cli
from spacte.files import check_ending, replace_file
from spacte.logs.description import NORMS
from spacte.logs.table import csv, radius_decimals, readable, records, render
from spacte.report import classes, members, page, plots
from spacte.report.comparable import check_pair, check_same_images, group_remarks, rows_of
from spacte.report.comparison import Comparison, compare, compare_experiments
from spacte.report.labels import labelled
from spacte.report.reading import ReadOptions, read_runs
from spacte.report.run import Run
from spacte.report.table import ReportTable, envelope, over_seeds, reached_radii, summary
from spacte.smooth.certificates import CERTIFICATES
from spacte.utils import UserError

_COLUMNS = """
Shares are in [0, 1], an ACR stands with its standard error (--over_seeds: with the standard deviation over the runs'
ACRs), a column headed by a radius holds the certified accuracy there, and the best of each column is bold: within the
rows of one `group`, which certify the same images with the same N0, N, alpha, --sequential, --skip_wrong, --exact_noise
and --precision. Logs without a configuration are a group of their own; the column is there if there are two groups.
Lower bounds and `abstained` are not ranked: a wrong answer is no abstention, with --skip_wrong least of all.

A run is named after the folders that tell its log from the others (5-heads/seed-1), or else after its flags. Each
interval of a comparison is for its row alone; `p_holm` is the p-value of no difference, adjusted for all rows of that
comparison, not for several comparisons. `draws` is the mean number of an image's estimation draws, where runs differ in
it. Of a run that stops early (--sequential) the ACR is a lower bound, marked ≥ and not compared, and a radius that its
rule did not decide shows "-".
"""


@dataclass
class ReportSettings:
    """What is read, and what is made of it; the flags of `_parser` say what each field is."""

    logs: list[Path] | tuple[()] = ()
    radii: list[float] | None = None
    norm: str = "l2"
    format: str = "markdown"
    certificate: str | None = None
    top_k: int | None = None
    heads: bool = False
    over_seeds: bool = False
    members: bool = False
    by_class: float | None = None
    envelope: bool = False
    compare: list[Path] | None = None
    baseline: Path | None = None
    curves: Path | None = None
    histogram: Path | None = None
    ecdf: Path | None = None
    training: list[Path] | None = None
    html: Path | None = None

    def __post_init__(self) -> None:
        """A radius given twice is one column; --by_class without one takes its norm's."""
        if self.radii:
            self.radii = list(dict.fromkeys(self.radii))
        if self.by_class is not None and math.isnan(self.by_class):
            self.by_class = 2 / 255 if self.norm == "linf" else 0.5


def _parser(description: str) -> cli.Parser:
    parser = cli.Parser(description.rstrip() + "\n" + _COLUMNS)
    add = parser.add_argument
    add("logs", nargs="*", type=Path, metavar="LOG", help="certification logs, or folders of them")
    add(
        "--radii",
        nargs="+",
        type=cli.radius,
        help="of the columns, 0.25 or 2/255; default: multiples of 0.25 (ImageNet: 0.5; Linf: of 1/255)",
    )
    add("--norm", choices=NORMS, help="of all radii: what an L2 certificate is worth in Linf and L1")
    formats = "of the tables; csv: one table, that of the comparisons, members or classes where they are requested"
    add("--format", choices=("markdown", "csv", "latex", "json"), help=formats)
    again = "recompute certificates from the counts; both: two rows per log (default: the log's own)"
    add("--certificate", choices=(*CERTIFICATES, "both"), help=again)
    again = "certify again from the counts, that the label is among the K classes of most votes"
    add("--top_k", type=cli.positive_int, metavar="K", help=again)
    add("--heads", action="store_true", help="also a row for each head alone, from the counts beside a log")
    add(
        "--over_seeds",
        action="store_true",
        help="one row, one curve per experiment: mean and standard deviation over its seeds",
    )
    add(
        "--members",
        action="store_true",
        help="also a table: each member of an ensemble alone, what their vote adds",
    )
    by_class = "also a table: each class's certified accuracy at 0 and at the radius R (without one, 0.5 or Linf 2/255)"
    add("--by_class", nargs="?", const=math.nan, type=cli.radius, metavar="R", help=by_class)
    add("--envelope", action="store_true", help="also rows with a method's best over sigma at each radius")
    compared = "the difference of two logs, image by image, or of the runs in two folders"
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help=compared)
    add("--baseline", type=Path, metavar="LOG", help="compare each log with this one")
    add("--curves", type=Path, metavar="FILE", help=f"picture of certified accuracy ({', '.join(plots.ENDINGS)})")
    add("--histogram", type=Path, metavar="FILE", help="picture of the radii")
    add("--ecdf", type=Path, metavar="FILE", help="picture of the distribution of the label's probability under noise")
    add(
        "--training",
        nargs=2,
        type=Path,
        metavar=("FOLDER", "FILE"),
        help="picture of a training run's TensorBoard files",
    )
    add("--html", type=Path, metavar="FILE", help="one page: table, comparisons, curves, images, configurations")
    parser.set_defaults(**cli.defaults_of(ReportSettings))
    return parser


def main(description: str) -> None:
    """The command line of report.py."""
    cli.run_with_settings(_parser(description), report, ReportSettings)


def report(settings: ReportSettings) -> None:
    """Print the tables and comparisons of logs, and write the pictures and the page that are requested.

    Raises UserError, before anything is written, if a file cannot be read or written or settings exclude each other.
    """
    _check(settings)
    files: dict[Path, str | bytes] = {}  # written once all of them are there
    if settings.training:
        folder, path = settings.training
        files[path] = plots.rendered(plots.training(folder), path)
    runs, comparisons, table = [], [], None
    for certificate in CERTIFICATES if settings.certificate == "both" else [settings.certificate]:
        reading = ReadOptions(settings.heads, certificate, settings.top_k, settings.norm)
        some = read_runs(settings.logs, reading) if settings.logs else []
        some, compared = _comparisons(some, settings, replace(reading, heads=False))
        comparisons += compared
        runs += some
    if runs:
        radii = settings.radii or reached_radii(runs)
        table = (over_seeds if settings.over_seeds else summary)(runs, radii)
        if settings.envelope:
            for run in runs[1:]:
                check_pair(runs[0], run)
            table = envelope(table, radii)
    remarks = group_remarks(runs) if table is not None and "group" in readable(table) else []
    parts = _parts(runs, settings)
    rows = [some for _, some in rows_of(runs, settings.over_seeds)]
    if settings.curves:
        files[settings.curves] = plots.rendered(plots.curves(rows), settings.curves)
    if settings.histogram:
        files[settings.histogram] = plots.rendered(plots.histogram(runs), settings.histogram)
    if settings.ecdf:
        files[settings.ecdf] = plots.rendered(plots.probabilities(rows), settings.ecdf)
    if settings.html and table is not None:
        files[settings.html] = page.html(rows, table, comparisons, parts, remarks)
    _print(table, remarks, comparisons, parts, settings.format)
    for path, content in files.items():
        replace_file(path, content)
        print(f"wrote {path}", file=sys.stderr)


def _check(settings: ReportSettings) -> None:
    """UserError if flags do not go together or a file cannot be what its name says."""
    if not (settings.logs or settings.compare or settings.training):
        raise UserError("nothing to read: give logs, folders of logs, --compare A B or --training FOLDER FILE")
    if not settings.logs:
        needing = ("baseline", "curves", "histogram", "ecdf", "html", "envelope", "heads", "over_seeds", "members")
        for name in (*needing, "by_class"):
            if getattr(settings, name) is not None and getattr(settings, name) is not False:
                beside = ", also beside --compare" if settings.compare else ""
                raise UserError(f"--{name} needs logs, or folders of logs{beside}")
    pictures = [
        path
        for path in (settings.curves, settings.histogram, settings.ecdf, settings.training and settings.training[1])
        if path
    ]
    for path in pictures:
        check_ending(path, plots.ENDINGS)
    if len({path.resolve() for path in pictures}) < len(pictures):
        raise UserError("two pictures cannot be written to one file")
    for path in [*pictures, *([settings.html] if settings.html else [])]:
        if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise UserError(f"'{path}' cannot be written: give a file in a folder that is there and can be written to")
    tables = {"--members": settings.members, "--by_class": settings.by_class is not None}
    tables |= {"comparisons (--compare, --baseline)": bool(settings.compare or settings.baseline)}
    if settings.format == "csv" and sum(tables.values()) > 1:
        both = " and ".join(name for name, asked in tables.items() if asked)
        raise UserError(f"--format csv prints one table: request only one of {both}")
    if settings.html:
        check_ending(settings.html, page.ENDINGS)
    if settings.top_k == 1:
        raise UserError("--top_k 1 is what every log certifies: take at least 2")


def _parts(runs: list[Run], settings: ReportSettings) -> list[ReportTable]:
    """The tables of members and of classes, where they are requested."""
    parts = []
    if settings.members:
        found = members.table(runs, settings.over_seeds)
        if found.empty and settings.format != "json":
            raise UserError("--members: no log tells what its members voted")
        title = "What the vote adds to its members"
        parts.append(ReportTable("members", title, found, members.remarks(runs), radius_decimals(settings.norm)))
    if settings.by_class is not None:
        found = classes.table(runs, settings.by_class, settings.over_seeds)
        parts.append(ReportTable("by_class", "Certified accuracy by class", found, classes.given_up(runs)))
    return parts


def _print(
    table: pd.DataFrame | None,
    remarks: list[str],
    comparisons: list[Comparison],
    parts: list[ReportTable],
    style: str,
) -> None:
    if style == "json":
        found = {"logs": [] if table is None else records(table)}
        found |= {"comparisons": [one.record() for one in comparisons]}
        print(json.dumps(found | {part.name: records(part.table) for part in parts}, indent=2))
    elif style == "csv" and (comparisons or parts):  # one table, for programs; the sentences are for people
        for line in [one.sentences() for one in comparisons] + [line for part in parts for line in part.remarks]:
            print(line, file=sys.stderr)
        tables = [one.rows() for one in comparisons] or [part.table for part in parts]
        print(csv(pd.concat(tables)))
    else:
        texts = [] if table is None else [render(table, style, remarks)]
        texts += [part.text(style) for part in parts]
        texts += [one.text(style) for one in comparisons]
        if texts:
            print("\n\n".join(texts))


def _comparisons(runs: list[Run], settings: ReportSettings, reading: ReadOptions) -> tuple[list[Run], list[Comparison]]:
    """Those of --compare and --baseline, and the runs, named together with theirs: a name means one run."""
    sides = [read_runs([path], reading) for path in settings.compare or ()]
    baselines = read_runs([settings.baseline], reading) if settings.baseline else []
    if len(baselines) > 1:
        raise UserError(f"--baseline {settings.baseline}: give one log")
    check_same_images([*runs, *baselines])
    every = iter(labelled([*runs, *baselines, *itertools.chain(*sides)]))
    runs, baselines, *sides = ([next(every) for _ in some] for some in (runs, baselines, *sides))
    compared = [_compare_sides(settings, *sides)] if sides else []
    for baseline in baselines:
        own = (baseline.path.resolve(), baseline.heads)
        others = [run for run in runs if (run.path.resolve(), run.heads) != own]
        if not others:
            raise UserError(f"--baseline {settings.baseline}: there is no other log to compare with it")
        compared += [compare(run, baseline, settings.radii) for run in others]
    return runs, compared


def _compare_sides(settings: ReportSettings, a: list[Run], b: list[Run]) -> Comparison:
    """Of two logs, or of two experiments: the runs in two folders."""
    if {run.path.resolve() for run in a} & {run.path.resolve() for run in b}:
        raise UserError(f"--compare {' '.join(map(str, settings.compare or ()))}: they have a log in common")
    check_same_images([*a, *b])
    if len(a) == len(b) == 1:
        return compare(a[0], b[0], settings.radii)
    return compare_experiments(a, b, settings.radii)
