"""Read certification logs: tables, comparisons, pictures, one page of all of it.

python codes/report.py LOG... [FOLDER...]                       # a table; a folder stands for all logs in it
python codes/report.py FOLDER --envelope --format latex         # for a paper, with the best over sigma
python codes/report.py --compare A.log B.log                    # what the same images say of the difference
python codes/report.py LOG... --baseline SINGLE.log             # each against one
python codes/report.py LOG... --curves curves.pdf --html report.html
python codes/report.py --training runs/<...>/<run> training.png
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from spacte import cli, figures, page
from spacte.comparison import Comparison, compare
from spacte.report import (
    FORMATS,
    Run,
    check_same_images,
    envelope,
    reached_radii,
    read_runs,
    records,
    render,
    summary,
)
from spacte.utils import UserError


def _flags() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("logs", nargs="*", type=Path, metavar="LOG", help="certification logs, or folders of them")
    add("--radii", nargs="+", type=cli.non_negative_float, help="default: the data set's, as far as a log reaches")
    add("--format", choices=FORMATS, default="markdown")
    add("--heads", action="store_true", help="a row for each head alone, from the counts beside a log")
    add("--envelope", action="store_true", help="rows with the best over sigma at each radius")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="the difference of two logs, image by image")
    add("--baseline", type=Path, metavar="LOG", help="compare each log with this one")
    add("--curves", type=Path, metavar="FILE", help=f"picture of certified accuracy ({', '.join(figures.ENDINGS)})")
    add("--histogram", type=Path, metavar="FILE", help="picture of the radii")
    add(
        "--training",
        nargs=2,
        type=Path,
        metavar=("FOLDER", "FILE"),
        help="picture of a training run's TensorBoard files",
    )
    add("--html", type=Path, metavar="FILE", help="one page: table, curves, every image, configurations")
    return parser


def _main() -> None:
    args = _flags().parse_args()
    if not (args.logs or args.compare or args.training):
        raise UserError("nothing to read: give logs, folders of logs, --compare A B or --training FOLDER FILE")
    if not args.logs:
        for name in ("baseline", "curves", "histogram", "html", "envelope", "heads"):
            if getattr(args, name):
                raise UserError(f"--{name} needs logs, or folders of logs")
    for path in (args.curves, args.histogram, args.training and args.training[1]):
        if path:
            figures.check_ending(path)
    if args.training:
        figures.save(figures.training(args.training[0]), args.training[1])
        _wrote(args.training[1])
    runs = read_runs(args.logs, args.heads) if args.logs else []
    comparisons = _comparisons(runs, args)
    if runs:
        radii = args.radii or reached_radii(runs)
        table = summary(runs, radii)
        if args.envelope:
            table = envelope(table, radii)
        if args.format != "json":
            print(render(table, args.format))
        for draw, path in ((figures.curves, args.curves), (figures.histogram, args.histogram)):
            if path:
                figures.save(draw(runs), path)
                _wrote(path)
        if args.html:
            page.write(runs, table, comparisons, args.html)
            _wrote(args.html)
    if args.format == "json":
        print(
            json.dumps({"logs": records(table) if runs else [], "comparisons": [one.record() for one in comparisons]})
        )
        return
    for number, one in enumerate(comparisons):
        if runs or number:
            print()
        print(one.text(args.format))


def _comparisons(runs: list[Run], args: Namespace) -> list[Comparison]:
    pairs = []
    if args.compare:
        read = {run.path: run for run in read_runs(args.compare)}
        if set(read) != set(args.compare) or len(read) != 2:
            raise UserError("--compare {} {}: give two logs".format(*args.compare))
        pairs.append([read[path] for path in args.compare])
    if args.baseline:
        baseline, *more = read_runs([args.baseline])
        if more:
            raise UserError(f"--baseline {args.baseline}: give one log")
        check_same_images([*runs, baseline])
        pairs += [
            (run, baseline)
            for run in runs
            if (run.path.resolve(), run.heads) != (baseline.path.resolve(), baseline.heads)
        ]
    return [compare(*pair, args.radii) for pair in pairs]


def _wrote(path: Path) -> None:
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(_main)
