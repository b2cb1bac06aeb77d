"""One prediction run: Cohen et al.'s PREDICT on each image -> log."""

from argparse import Namespace

from spacte import cli, subject, sweep
from spacte.certlog import elapsed, read_log
from spacte.core_mhead import ABSTAIN, Asks, prediction, tally
from spacte.counts import Votes, voter_of
from spacte.processes import process_rank, start_processes
from spacte.runfiles import Format, Ledger, RunFiles

COLUMNS = ("idx", "label", "predict", "correct", "time")


def main(description: str) -> None:
    """The command line of predict_mhead.py."""
    cli.run(lambda: predict(_flags(description).parse_args()))


def _flags(description: str) -> cli.Parser:
    parser = cli.Parser(description)
    subject.add_flags(parser)
    sweep.add_flags(parser)
    parser.add_argument("--N", type=cli.positive_int, default=100_000, help="draws")
    parser.add_argument("--alpha", type=cli.open_probability, default=0.001, help="probability of a wrong prediction")
    return parser


def predict(args: Namespace) -> None:
    """Predict test images as the flags say; leaves a log `idx label predict correct time` and its counts.

    Raises UserError before anything is written where a flag, file or folder is wrong.
    """
    start_processes()
    target = subject.prepare(args, args.N)
    config = {"kind": "predict", **target.config, "N": args.N, "alpha": args.alpha}
    folder = target.folder(args.logs_dir, "predict-mhead")
    files = sweep.run_files(folder, f"{target.run}-predict-skip-{args.skip}", args)
    sweep.sweep(
        sweep.planned_indices(len(target.split), args.skip, args.max, args.shard),
        files,
        lambda: Ledger(files, config, target.about(args), FORMAT, args.overwrite),
        lambda indices: target.count("predict", indices, lambda label: _draws(args), args.batch_size),
        lambda votes: sum(_predicted(one, config) == one.label for one in votes) / len(votes),
        "accuracy",
    )
    if process_rank() == 0:
        print(f"{summarise(files)}\nlog: {files.log}")


def summarise(files: RunFiles) -> str:
    """Images, accuracy and abstentions of a prediction log, in a line."""
    log = read_log(files.log, COLUMNS)
    abstained = (log["predict"] == ABSTAIN).mean()
    return f"{len(log)} images  accuracy {log['correct'].mean():.3f}  abstained {abstained:.3f}"


def _draws(args: Namespace) -> Asks:
    counts = yield from tally(args.N, args.batch_size)
    return counts.new_zeros(counts.shape), counts  # a prediction selects nothing


def _predicted(votes: Votes, config: dict) -> int:
    return prediction(votes.estimation[voter_of(config)], config["alpha"] - config["noise_slack"])


def _row(votes: Votes, config: dict) -> str:
    predict = _predicted(votes, config)
    columns = (votes.idx, votes.label, predict, int(predict == votes.label), elapsed(votes.seconds))
    return "\t".join(map(str, columns)) + "\n"


FORMAT = Format("\t".join(COLUMNS) + "\n", _row)
