"""One certification run: votes of each image -> log -> summary."""

from argparse import Namespace

from spacte import certlog, cli, subject, sweep
from spacte.bounds import RadiiDecided, RadiusKnown
from spacte.certlog import average_certified_radius
from spacte.core_mhead import Asks, selection_and_estimation
from spacte.counts import certificate_row, largest_radius, log_table, rule_of
from spacte.processes import process_rank, start_processes
from spacte.report import render, summary, table_radii
from spacte.runfiles import Format, Ledger, RunFiles
from spacte.runs import read_runs
from spacte.utils import UserError, replace_file

FORMAT = Format(certlog.HEADER, certificate_row)


def main(description: str) -> None:
    """The command line of certify_mhead.py."""
    cli.run(lambda: certify(_flags(description).parse_args()))


def _flags(description: str) -> cli.Parser:
    parser = cli.Parser(description)
    add = parser.add_argument
    subject.add_flags(parser)
    sweep.add_flags(parser)
    add("--N0", type=cli.positive_int, default=100, help="draws that select the class")
    add("--N", type=cli.positive_int, default=100_000, help="draws that bound its probability, at most if --sequential")
    add("--alpha", type=cli.open_probability, default=0.001, help="probability that a certificate is wrong")
    add("--skip_wrong", action="store_true", help="draw no more for an image whose selected class is not its label")
    add("--sequential", action="store_true", help="stop an image's draws early, with an anytime-valid bound")
    radii = "--sequential: stop when these are certified or given up (the table's)"
    add("--radii", type=cli.non_negative_float, nargs="+", help=radii)
    add("--tolerance", type=cli.positive_float, help="--sequential: stop when the radius is known to within this")
    add(
        "--give_up",
        type=cli.open_probability,
        help="--sequential: level of the bound by which a radius is given up (0.01)",
    )
    return parser


def certify(args: Namespace) -> None:
    """Certify test images as the flags say; leaves the log, its counts, its configuration and its summary.

    A run that was interrupted goes on after its last image. Raises UserError before anything is written where a flag,
    file or folder is wrong.
    """
    start_processes()
    _check_stopping(args)
    target = subject.prepare(args, args.N)
    config = {"kind": "certify", **target.config}
    config |= {name: getattr(args, name) for name in ("N0", "N", "alpha", "skip_wrong", "sequential")}
    limit = largest_radius(config)
    config["sequential"] = _stopping(args, limit, config["dataset"])
    folder = target.folder(args.logs_dir, "certify-mhead")
    files = sweep.run_files(folder, f"{target.run}-certify-skip-{args.skip}", args)

    enough = _stopping_rule(config, target.sigma)

    def asks(label: int) -> Asks:
        """What an image of that label asks for."""
        wanted = label if args.skip_wrong else None
        return selection_and_estimation(args.N0, args.N, args.batch_size, target.voter, enough, wanted)

    sweep.sweep(
        sweep.planned_indices(len(target.split), args.skip, args.max, args.shard),
        files,
        lambda: Ledger(files, config, target.about(args), FORMAT, args.overwrite),
        lambda indices: target.count("certify", indices, asks, args.batch_size),
        lambda votes: average_certified_radius(log_table(votes, config)),
        "ACR",
    )
    if process_rank() == 0:
        print(f"{write_summary(files, config)}\nlog: {files.log}")


def write_summary(files: RunFiles, config: dict) -> str:
    """Write ACR and certified accuracy at the radii that N draws can reach beside the log; returns the table."""
    table = render(
        summary(read_runs([files.log]), table_radii(largest_radius(config), config["dataset"])[1:]), "markdown"
    )
    replace_file(files.summary, lambda temporary: temporary.write_text(table + "\n", encoding="utf-8"))
    return table


def _check_stopping(args: Namespace) -> None:
    given = [name for name in ("radii", "tolerance", "give_up") if getattr(args, name) is not None]
    if given and not args.sequential:
        raise UserError(f"--{given[0]} says when to stop: it needs --sequential")
    if "tolerance" in given and len(given) > 1:
        raise UserError(f"--tolerance and --{given[0]} belong to two rules for stopping: give one of them")


def _stopping(args: Namespace, limit: float, dataset: str) -> dict | None:
    """The stopping rule as the configuration records it; None where N draws are fixed."""
    if not args.sequential:
        return None
    if args.tolerance is not None:
        return {"tolerance": args.tolerance}
    radii = sorted(args.radii) if args.radii else table_radii(limit, dataset).tolist()
    return {"radii": radii, "give_up": args.give_up or 0.01}


def _stopping_rule(config: dict, sigma: float):
    stopping, alpha = config["sequential"], rule_of(config).alpha
    if stopping is None:
        return None
    if "tolerance" in stopping:
        return RadiusKnown(stopping["tolerance"], config["N"], alpha, sigma)
    return RadiiDecided(stopping["radii"], config["N"], alpha, sigma, stopping["give_up"])
