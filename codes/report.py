"""Tables from certification logs.

python codes/report.py LOG... [--heads]
"""

from pathlib import Path

from spacte import cli
from spacte.report import markdown, read_logs, summary


def _main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="certification logs")
    parser.add_argument("--heads", action="store_true", help="a row for each head alone, from the counts beside a log")
    args = parser.parse_args()
    print(markdown(summary(read_logs(args.logs, args.heads))))


if __name__ == "__main__":
    cli.run(_main)
