"""The command line of report.py: flags -> runs -> table, comparisons, pictures, page."""

import itertools
import json
import math
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pandas as pd

from spacte import cli
from spacte.files import check_ending, replace_file
from spacte.logs.described import NORMS
from spacte.logs.table import FORMATS, csv, decimals, records, render
from spacte.report import classes, members, page, plots
from spacte.report.comparable import check_same_images, rows_of
from spacte.report.comparison import Comparison, compare, compare_experiments
from spacte.report.reading import Reading, labelled, read_runs
from spacte.report.run import Run
from spacte.report.table import Part, envelope, over_seeds, reached_radii, summary
from spacte.smooth.certificates import CERTIFICATES
from spacte.utils import UserError


def _flags(description: str) -> cli.Parser:
    parser = cli.Parser(description)
    add = parser.add_argument
    add("logs", nargs="*", type=Path, metavar="LOG", help="certification logs, or folders of them")
    add(
        "--radii",
        nargs="+",
        type=cli.radius,
        help="of the columns, 0.25 or 2/255; default: multiples of 0.25 (ImageNet: 0.5; Linf: of 1/255)",
    )
    add("--norm", choices=NORMS, default="l2", help="of all radii: what an L2 certificate is worth in Linf and L1")
    formats = "of the tables; csv: one table, that of the comparisons, members or classes where they are requested"
    add("--format", choices=FORMATS, default="markdown", help=formats)
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
    return parser


def main(description: str) -> None:
    """The command line of report.py."""
    cli.run(lambda: _report(_flags(description).parse_args()))


def _report(args: Namespace) -> None:
    _check(args)
    files: dict[Path, str | bytes] = {}  # written once all of them are there
    if args.training:
        folder, path = args.training
        files[path] = plots.rendered(plots.training(folder), path)
    runs, comparisons, table = [], [], None
    for certificate in CERTIFICATES if args.certificate == "both" else [args.certificate]:
        reading = Reading(args.heads, certificate, args.top_k, args.norm)
        some = read_runs(args.logs, reading) if args.logs else []
        some, compared = _comparisons(some, args, replace(reading, heads=False))
        comparisons += compared
        runs += some
    if runs:
        radii = args.radii or reached_radii(runs)
        table = (over_seeds if args.over_seeds else summary)(runs, radii)
        if args.envelope:
            table = envelope(table, radii)
    parts = _parts(runs, args)
    rows = [some for _, some in rows_of(runs, args.over_seeds)]
    if args.curves:
        files[args.curves] = plots.rendered(plots.curves(rows), args.curves)
    if args.histogram:
        files[args.histogram] = plots.rendered(plots.histogram(runs), args.histogram)
    if args.ecdf:
        files[args.ecdf] = plots.rendered(plots.probabilities(rows), args.ecdf)
    if args.html and table is not None:
        files[args.html] = page.html(rows, table, comparisons, parts)
    _print(table, comparisons, parts, args.format)
    for path, content in files.items():
        replace_file(path, content)
        print(f"wrote {path}", file=sys.stderr)


def _check(args: Namespace) -> None:
    """UserError where flags do not go together or a file cannot be what its name says."""
    if not (args.logs or args.compare or args.training):
        raise UserError("nothing to read: give logs, folders of logs, --compare A B or --training FOLDER FILE")
    if not args.logs:
        needing = ("baseline", "curves", "histogram", "ecdf", "html", "envelope", "heads", "over_seeds", "members")
        for name in (*needing, "by_class"):
            if getattr(args, name) is not None and getattr(args, name) is not False:
                beside = ", also beside --compare" if args.compare else ""
                raise UserError(f"--{name} needs logs, or folders of logs{beside}")
    pictures = [path for path in (args.curves, args.histogram, args.ecdf, args.training and args.training[1]) if path]
    for path in pictures:
        check_ending(path, plots.ENDINGS)
    if len({path.resolve() for path in pictures}) < len(pictures):
        raise UserError("two pictures cannot be written to one file")
    for path in [*pictures, *([args.html] if args.html else [])]:
        if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise UserError(f"'{path}' cannot be written: give a file in a folder that is there and can be written to")
    tables = {"--members": args.members, "--by_class": args.by_class is not None}
    tables |= {"comparisons (--compare, --baseline)": bool(args.compare or args.baseline)}
    if args.format == "csv" and sum(tables.values()) > 1:
        both = " and ".join(name for name, asked in tables.items() if asked)
        raise UserError(f"--format csv prints one table: request only one of {both}")
    if args.html:
        check_ending(args.html, page.ENDINGS)
    if args.top_k == 1:
        raise UserError("--top_k 1 is what every log certifies: take at least 2")
    if args.radii:
        args.radii = list(dict.fromkeys(args.radii))
    if args.by_class is not None and math.isnan(args.by_class):
        args.by_class = 2 / 255 if args.norm == "linf" else 0.5


def _parts(runs: list[Run], args: Namespace) -> list[Part]:
    """The tables of members and of classes, where they are requested."""
    parts = []
    if args.members:
        found = members.table(runs, args.over_seeds)
        if found.empty and args.format != "json":
            raise UserError("--members: no log tells what its members voted")
        title = "What the vote adds to its members"
        parts.append(Part("members", title, found, members.remarks(runs), decimals(args.norm)))
    if args.by_class is not None:
        found = classes.table(runs, args.by_class, args.over_seeds)
        parts.append(Part("by_class", "Certified accuracy by class", found, classes.given_up(runs)))
    return parts


def _print(table: pd.DataFrame | None, comparisons: list[Comparison], parts: list[Part], style: str) -> None:
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
        texts = [] if table is None else [render(table, style)]
        texts += [part.text(style) for part in parts]
        texts += [one.text(style) for one in comparisons]
        if texts:
            print("\n\n".join(texts))


def _comparisons(runs: list[Run], args: Namespace, reading: Reading) -> tuple[list[Run], list[Comparison]]:
    """Those of --compare and --baseline, and the runs, named together with theirs: a name means one run."""
    sides = [read_runs([path], reading) for path in args.compare or ()]
    baselines = read_runs([args.baseline], reading) if args.baseline else []
    if len(baselines) > 1:
        raise UserError(f"--baseline {args.baseline}: give one log")
    check_same_images([*runs, *baselines])
    every = iter(labelled([*runs, *baselines, *itertools.chain(*sides)]))
    runs, baselines, *sides = ([next(every) for _ in some] for some in (runs, baselines, *sides))
    compared = [_compare_sides(args, *sides)] if sides else []
    for baseline in baselines:
        own = (baseline.path.resolve(), baseline.heads)
        others = [run for run in runs if (run.path.resolve(), run.heads) != own]
        if not others:
            raise UserError(f"--baseline {args.baseline}: there is no other log to compare with it")
        compared += [compare(run, baseline, args.radii) for run in others]
    return runs, compared


def _compare_sides(args: Namespace, a: list[Run], b: list[Run]) -> Comparison:
    """Of two logs, or of two experiments: the runs in two folders."""
    if {run.path.resolve() for run in a} & {run.path.resolve() for run in b}:
        raise UserError("--compare {} {}: they have a log in common".format(*args.compare))
    check_same_images([*a, *b])
    if len(a) == len(b) == 1:
        return compare(a[0], b[0], args.radii)
    return compare_experiments(a, b, args.radii)
