"""Logs from logs: the shards of a run merged, or the same votes at another level. No network runs."""

import warnings
from argparse import Namespace
from pathlib import Path

from spacte import certification, cli, predicting
from spacte.counts import Votes, largest_radius, read_votes
from spacte.runfiles import Ledger, RunFiles, config_differences
from spacte.sweep import planned_indices
from spacte.utils import UserError, make_folder


def merge_main(description: str) -> None:
    """The command line of merge_logs.py."""
    parser = cli.Parser(description)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="the logs of all shards of one run")
    parser.add_argument("--overwrite", action="store_true", help="replace a merged log that is there")
    args = parser.parse_args()
    cli.run(lambda: merge(args.logs, args.overwrite))


def merge(logs: list[Path], overwrite: bool) -> None:
    """Write the log, counts, configuration and summary that the shards' run would have left in one piece.

    Raises UserError, before anything is written, where configurations differ, a shard is missing or there twice, or an
    image is.
    """
    shards = [RunFiles(log) for log in logs]
    contents = [shard.read_json() for shard in shards]
    first, flags = contents[0], [content["about"]["flags"] for content in contents]
    for log, content in zip(logs[1:], contents[1:], strict=True):
        differences = config_differences(first["config"], content["config"])
        if differences:
            raise UserError(f"'{logs[0]}' and '{log}' have different configurations: {differences}")
    if len({flag["max"] for flag in flags}) > 1:
        raise UserError("the shards were run with different --max")
    if any(flag["shard"] is None for flag in flags):
        raise UserError("these are not the logs of shards: run certify_mhead.py with --shard")
    expected = planned_indices(first["about"]["images"], first["config"]["skip"], flags[0]["max"], None)
    votes = _disjoint(shards)
    missing = [idx for idx in expected if idx not in votes]
    if missing:
        raise UserError(f"{len(missing)} of {len(expected)} images are in no shard's log, first idx {missing[0]}")
    if len(votes) > len(expected):
        raise UserError(f"the shards hold images beyond the run's: idx {max(votes)}")
    name = logs[0].name.replace("-shard-{}-of-{}".format(*flags[0]["shard"]), "")
    about = first["about"] | {"flags": flags[0] | {"shard": None}}
    about["merged"] = {str(log): content["about"] for log, content in zip(logs, contents, strict=True)}
    _write(RunFiles(logs[0].with_name(name)), first["config"], about, votes, overwrite)


def relog_main(description: str) -> None:
    """The command line of relog.py."""
    parser = cli.Parser(description)
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="a certification log; the counts beside it are read")
    add("--alpha", type=cli.open_probability, help="probability that a certificate is wrong (as in the log)")
    add("--head", type=cli.non_negative_int, help="this head alone votes, from 0 (as in the log)")
    add("--output", type=Path, help="the new log (<log>-alpha-<alpha>[-head-<k>].log beside it)")
    add("--overwrite", action="store_true", help="replace the output if it is there")
    args = parser.parse_args()
    cli.run(lambda: relog(args))


def relog(args: Namespace) -> None:
    """Write the log that the same votes give at another alpha, or for one head: each certificate holds at its alpha.

    That is so because neither changes what was drawn: alpha enters only the bound, and an anytime bound holds whatever
    rule stopped the draws. It is so for an alpha and a head that were chosen without regard to the votes: the best of
    several heads, picked by their logs, certifies at the sum of their alphas only.
    Raises UserError before anything is written where that cannot be done.
    """
    source = RunFiles(args.log)
    content = source.read_json()
    config = dict(content["config"])
    votes = {one.idx: one for one in read_votes(source.counts)}
    if not votes:
        raise UserError(f"'{source.counts}' holds no votes")
    flags = content["about"]["flags"]
    planned = planned_indices(content["about"]["images"], config["skip"], flags["max"], flags["shard"])
    if len(votes) < len(planned):
        warnings.warn(f"'{args.log}' is unfinished: {len(votes)} of {len(planned)} images", stacklevel=1)
    if args.alpha is not None:
        config["alpha"] = args.alpha
    if args.head is not None:
        heads = len(next(iter(votes.values())).selection) - 1
        if args.head >= max(heads, 1):
            raise UserError(f"--head {args.head}: the counts' heads are 0..{max(heads, 1) - 1}")
        if config.get("skip_wrong"):
            raise UserError(f"'{args.log}' was made with --skip_wrong: its heads were not counted on every image")
        config["head"] = args.head
    head = "" if args.head is None else f"-head-{args.head}"
    output = args.output or args.log.with_name(f"{args.log.stem}-alpha-{config['alpha']:g}{head}.log")
    if output.suffix != ".log" or output.resolve() == args.log.resolve():
        raise UserError(f"--output '{output}': choose a name that ends in .log and is not the log's own")
    _write(RunFiles(output), config, content["about"] | {"made_from": str(args.log)}, votes, args.overwrite)


def _disjoint(shards: list[RunFiles]) -> dict[int, Votes]:
    """All shards' votes by idx; UserError where an image is in two."""
    votes: dict[int, Votes] = {}
    where: dict[int, Path] = {}
    for shard in shards:
        for one in read_votes(shard.counts):
            if one.idx in votes:
                raise UserError(f"idx {one.idx} is in '{where[one.idx]}' and in '{shard.counts}'")
            votes[one.idx], where[one.idx] = one, shard.counts
    return votes


def _write(files: RunFiles, config: dict, about: dict, votes: dict[int, Votes], overwrite: bool) -> None:
    """A finished run's files from its votes."""
    certifies = config["kind"] == "certify"
    if certifies:
        largest_radius(config)  # refuses what can never certify
    if files.log.exists() and not overwrite:
        raise UserError(f"'{files.log}' exists; --overwrite replaces it")
    make_folder(files.log.parent)
    log_format = certification.FORMAT if certifies else predicting.FORMAT
    ledger = Ledger(files, config, about, log_format, overwrite)
    ledger.plan(sorted(votes))
    for one in votes.values():
        ledger.add(one)
    text = certification.write_summary(files, config) if certifies else predicting.summarise(files)
    print(f"{text}\nlog: {files.log}")
