"""Logs from logs: the shards of a run merged, or the same votes at another level. No network runs."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from spacte import cli
from spacte.certify.run_settings import RunSettings, shard_ending
from spacte.certify.writer import writing
from spacte.files import check_ending
from spacte.logs.certified import check_recertifiable
from spacte.logs.config import RunConfig, RunRecord, is_integer
from spacte.logs.counts import Counts, VoteCounts, heads_of, read_counts
from spacte.logs.plans import Plan, plan_of
from spacte.logs.runfiles import CERTIFIED, RunFiles
from spacte.smooth.certificates import CERTIFICATES
from spacte.utils import UserError, listed

_MOST_IMAGES = 10**9  # of a split


def merge_main(description: str) -> None:
    """The command line of merge_logs.py."""
    parser = cli.Parser(description)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="the logs of all shards of one run")
    parser.add_argument("--overwrite", action="store_true", help="replace a merged log that is there")
    args = parser.parse_args()
    cli.run(lambda: merge(args.logs, args.overwrite))


def merge(logs: list[Path], overwrite: bool = False) -> None:
    """Write the log, counts, configuration and summary that the shards' run would have left in one piece.

    Raises UserError, before anything is written, where configurations differ, a shard is missing or there twice, or an
    image is.
    """
    for log in logs:
        _check_log(log)
    shards = [RunFiles(log) for log in logs]
    contents = [shard.read_json() for shard in shards]
    first, runs = contents[0], [_settings(content, shard) for content, shard in zip(contents, shards, strict=True)]
    for log, content in zip(logs[1:], contents[1:], strict=True):
        differences = first.config.differences(content.config)
        if differences:
            raise UserError(f"'{logs[0]}' (there) and '{log}' (here) have different configurations: {differences}")
    if len({run.max for run in runs}) > 1:
        raise UserError("the shards were run with different --max")
    _check_shards([run.shard for run in runs])
    plan = plan_of(first.config, shards[0].json)
    counts: dict[int, Counts] = {}
    for shard, content, run in zip(shards, contents, runs, strict=True):
        part, planned = read_counts(shard.counts, plan.from_line), _number_of_images(content, run, shard)
        if len(part) != planned:
            raise UserError(f"'{shard.log}' is not whole: it holds {len(part)} of {planned} images")
        counts |= {one.idx: one for one in part}
    if len(counts) != _number_of_images(first, replace(runs[0], shard=None), shards[0]):
        raise UserError("the shards hold an image twice")
    ending = shard_ending(runs[0].shard)
    before, _, after = logs[0].name.rpartition(ending)  # it is there twice after an attack on a shard's log
    output = logs[0].with_name(before + after)
    if output.resolve() in [log.resolve() for log in logs]:
        raise UserError(f"'{logs[0]}' was renamed: its name must hold '{ending}'")
    _say_where_made_otherwise(contents)
    about = first.about | {"flags": first.about["flags"] | {"shard": None}}
    about["merged"] = {str(log): content.about for log, content in zip(logs, contents, strict=True)}
    _write(RunFiles(output), plan, about, counts, overwrite)


@dataclass(frozen=True)
class RelogSettings:
    """What is changed in a log; None: nothing."""

    alpha: float | None = None
    certificate: str | None = None
    top_k: int | None = None
    head: int | None = None
    output: Path | None = None
    overwrite: bool = False


def relog_main(description: str) -> None:
    """The command line of relog.py."""
    parser = cli.Parser(description)
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="a certification log; the counts beside it are read")
    add("--alpha", type=cli.open_probability, help="probability that a certificate is wrong (default: as in the log)")
    add(
        "--certificate",
        choices=CERTIFICATES,
        help="from the votes of the class alone or from all (default: as in the log)",
    )
    add("--top_k", type=cli.positive_int, metavar="K", help="that the label is among the K classes of most votes")
    add("--head", type=cli.non_negative_int, help="this head alone votes, from 0 (default: as in the log)")
    name = "<log>-alpha-<alpha>[-<certificate>][-top-<K>][-head-<h>].log"
    add("--output", type=Path, help=f"the new log ({name} beside it)")
    add("--overwrite", action="store_true", help="replace the output if it is there")
    args = parser.parse_args()
    cli.run(lambda: relog(args.log, cli.settings_of(RelogSettings, args)))


def relog(log: Path, settings: RelogSettings) -> None:
    """Write the log that the same votes give at another alpha, under another certificate, for top k or for one head.

    Each certificate holds at its alpha, because none of these changes what was drawn: alpha and the certificate enter
    only the bounds, and an anytime bound holds whatever rule stopped the draws. This presumes that alpha, certificate,
    k and head were chosen without regard to the votes: the best of several heads, picked by their logs, is certified
    only at the sum of their alphas. The class that top k certifies is the label, which does not depend on the votes.
    Raises UserError before anything is written if that cannot be done.
    """
    _check_log(log)
    source = RunFiles(log)
    content = source.read_json()
    run, config = _settings(content, source), content.config
    changes = {name: getattr(settings, name) for name in ("alpha", "certificate", "top_k")}
    config = config.with_certificate(**{name: value for name, value in changes.items() if value is not None})
    if settings.head is not None:
        config = config.of_head(settings.head)
    if config == content.config:
        raise UserError(f"'{log}' is certified so already: give another --alpha, --certificate, --top_k or --head")
    counts = {one.idx: one for one in read_counts(source.counts, plan_of(content.config, source.json).from_line)}
    if not counts:
        raise UserError(f"'{source.counts}' holds no votes")
    planned = _number_of_images(content, run, source)
    if len(counts) < planned:
        warnings.warn(f"'{log}' is unfinished: {len(counts)} of {planned} images", stacklevel=1)
    if settings.head is not None:
        _check_head(settings.head, next(iter(counts.values())), config, log)
    if settings.certificate is not None or settings.top_k is not None:
        _check_certificate(next(iter(counts.values())), config, source)
    plan = plan_of(config, source.json)
    output = settings.output or log.with_name(_relogged_name(log.stem, config, settings))
    if output.suffix != ".log" or output.resolve() == log.resolve():
        raise UserError(f"--output '{output}': choose a name that ends in .log and is not the log's own")
    _write(RunFiles(output), plan, content.about | {"made_from": str(log)}, counts, settings.overwrite)


def _relogged_name(stem: str, config: RunConfig, settings: RelogSettings) -> str:
    """The new log's name: how it is certified stands at the end, and once."""
    base = CERTIFIED.sub("", stem)
    head = CERTIFIED.sub(r"\g<head>", stem).removeprefix(base) if settings.head is None else f"-head-{settings.head}"
    ending = f"-alpha-{config.alpha:g}"
    ending += f"-{config.certificate}" if settings.certificate or config.certificate != "cohen" else ""
    ending += f"-top-{config.top_k}" if config.top_k else ""
    return f"{base}{ending}{head}.log"


def _check_certificate(counts: Counts, config: RunConfig, source: RunFiles) -> None:
    if config.kind != "certify" or not isinstance(counts, VoteCounts):
        raise UserError(f"'{source.log}' holds no certificates: --certificate and --top_k are for certification logs")
    if not counts.selection.any():
        raise UserError(f"'{source.counts}' holds no selection votes: no class was chosen by them")
    check_recertifiable(config, counts.selection.shape[1])


def _check_head(head: int, counts: Counts, config: RunConfig, log: Path) -> None:
    if not isinstance(counts, VoteCounts):
        raise UserError(f"'{log}' is an attack on the ensemble: its heads were not attacked")
    heads = heads_of(len(counts.selection))
    if head >= heads:
        raise UserError(f"--head {head}: the counts' heads are 0..{heads - 1}")
    if config.skip_wrong:  # where the ensemble is wrong, a head may be right, but was not counted
        raise UserError(f"'{log}' was made with --skip_wrong: its heads were not counted on every image")


def _settings(content: RunRecord, files: RunFiles) -> RunSettings:
    """Which images the run was about, by the flags that it was started with."""
    flags, earlier = content.about.get("flags"), content.about.get("earlier", [])
    whole = is_integer(content.about.get("images"), 1, _MOST_IMAGES)
    whole = whole and isinstance(earlier, list) and all(isinstance(one, dict) for one in earlier)
    if not (whole and isinstance(flags, dict) and _say_which(flags)):
        why = "flags and images are missing or wrong"
        raise UserError(f"'{files.json}' does not say which images the run was about: {why}")
    return RunSettings(content.config.skip, flags["max"], flags["shard"] and tuple(flags["shard"]))


def _say_which(flags: dict) -> bool:
    """Whether --max and --shard are there and legal, as JSON holds them."""
    if not {"max", "shard"} <= flags.keys() or not (flags["max"] is None or is_integer(flags["max"], 1)):
        return False
    shard = flags["shard"]
    if shard is None:
        return True
    return isinstance(shard, list) and len(shard) == 2 and is_integer(shard[1], 1) and is_integer(shard[0], 1, shard[1])


def _number_of_images(content: RunRecord, run: RunSettings, files: RunFiles) -> int:
    """How many images the run has: of the split's or, an attack, of a log's."""
    if content.config.kind != "attack":
        return len(run.chosen(range(content.about["images"])))
    attacked = content.about.get("attacked")
    if not is_integer(attacked, 1, _MOST_IMAGES):
        raise UserError(f"'{files.json}' does not say how many images are attacked")
    return len(RunSettings(shard=run.shard).chosen(range(attacked)))


def _check_shards(shards: list[tuple[int, int] | None]) -> None:
    """UserError if these are not all shards of one run, each once."""
    known = [shard for shard in shards if shard is not None]
    if len(known) < len(shards):
        raise UserError("these are not the logs of shards: run certify_mhead.py with --shard")
    number = known[0][1]
    for _, of in known:
        if of != number:
            raise UserError(f"shards of {number} and of {of} do not make one run")
    for k in range(1, number + 1):
        if known.count((k, number)) != 1:
            raise UserError(f"shard {k}/{number} is {'missing' if (k, number) not in known else 'there twice'}")


def _check_log(log: Path) -> None:
    check_ending(log, (".log",))
    if not log.is_file():
        raise UserError(f"there is no log '{log}'")


def _say_where_made_otherwise(contents: list[RunRecord]) -> None:
    """Warn where shards ran, also before they were resumed, on different devices or in passes of different sizes."""
    for name, what in (("device", "devices"), ("images_per_pass", "numbers of images per pass")):
        shards: dict[str, list[int]] = {}
        for content in contents:
            for value in {str(part.get(name)) for part in (content.about, *content.about.get("earlier", []))}:
                shards.setdefault(value, []).append(content.about["flags"]["shard"][0])
        if len(shards) > 1:
            each = "; ".join(f"{value}: {listed(sorted(those))}" for value, those in sorted(shards.items()))
            warnings.warn(
                f"the shards ran with different {what} ({each}): near ties may be decided otherwise than in one run; "
                "each certificate is of the network as its shard computed it",
                stacklevel=1,
            )


def _write(files: RunFiles, plan: Plan, about: dict, counts: dict[int, Counts], overwrite: bool) -> None:
    """A finished run's files from its counts."""
    if files.log.exists() and not overwrite:
        raise UserError(f"'{files.log}' exists; --overwrite replaces it")
    with writing(files, plan, about, sorted(counts), overwrite) as writer:
        writer.write(*counts.values())
    print(f"{writer.summary()}\nlog: {files.log}")
