"""What a table of certified accuracy costs the authors' way and ours, and whether the two agree.

    python codes/bench/bench_table.py --model_path save/<...>/epoch150.pth --data_dir D    # 100 images, N 100,000
    python codes/bench/bench_table.py --model_path save/<...>/epoch150.pth --data_dir D --skip 500 --N 10000

The ways, one after the other, on the same images:

    authors'     eager float32, batches of 128 noisy copies, votes counted one by one on the host, fixed N: `plain` in
                 bench.py
    fp32         certify_mhead.py with a fixed N; its name is the --precision that is computed in
    compiled     the same with --compile, which int8 has not
    sequential   the same with --sequential
    consensus    the same with --consensus K, where there are more than K heads
    together     all that there are of the three

`seconds` is what the whole table takes: the choice of a pass's size, the first batch, for which torch may compile, then
all draws, certificates and files. Loading, and what int8 measures while loading, is not counted. Each way is measured
once, and `ratio` is the authors' seconds divided by its own: on a machine that other programs use at the same time it
says little, unlike the ratio of bench.py, whose ways take turns. `draws` are the noisy copies that the table takes.

A way with a fixed N, except for the second one, draws only --share of N: the seconds after its first batch are
multiplied up, and so are its draws. Its votes are not. Its certificates are those of the N that stands in its row: they
are valid, smaller than those of all draws would be, and empty ("-") at radii that so few draws cannot reach.

Each row is then compared with the second one, image by image. Where it drew only a share, the second row's votes are
thinned to as many, at random without replacement: they are votes of as many independent draws, and the comparison is of
equals. The intervals are 95 % intervals of the paired differences over the same images: Student's t for the ACR, Bonett
and Price (2012) for certified accuracy at each radius (spacte.report.comparison). "agrees" says that 0 lies within the
interval; of many intervals some leave it out by chance. `sequential` stops early, so its ACR is lower by design, and
`consensus` is another classifier. SE is the standard error of a row's ACR over images.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bench_plain import plain_votes
from spacte import cli
from spacte.certify.certify import CertifySettings, certify_images
from spacte.certify.evaluation import Evaluation
from spacte.certify.loading import load
from spacte.certify.run_settings import RunSettings
from spacte.certify.settings import ClassifierSettings
from spacte.data.splits import Split
from spacte.device import select_device
from spacte.files import make_folder, replace_file
from spacte.logs.certified import largest_radius, log_table
from spacte.logs.certlog import acr_standard_error, average_certified_radius, certified_accuracy
from spacte.logs.counts import VoteCounts, read_counts
from spacte.logs.table import markdown, radius_names, records, table_radii
from spacte.model.checkpoint import load_classifier
from spacte.model.pass_size import fastest_pass_size, set_pass_size
from spacte.precision import INFERENCE_PRECISIONS
from spacte.report.comparison import Comparison, compare
from spacte.report.reading import read_runs
from spacte.report.run import Run
from spacte.utils import UserError

_WAYS = ("compiled", "sequential", "consensus", "together")
_COMPILING = ("compiled", "together")  # unless in int8, which has nothing to compile
_AS_CERTIFY = ("arch", "dataset", "num_heads", "noise_sd", "data_dir", "batch_size", "seed", "device", "precision")


def _flags(given: list[str]) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, metavar="CHECKPOINT", help="what certify_mhead.py takes; one checkpoint")
    for name, kind in (
        ("arch", str),
        ("dataset", str),
        ("num_heads", cli.positive_int),
        ("noise_sd", cli.positive_float),
    ):
        add(f"--{name}", type=kind, help="as in the checkpoint; published ones do not say")
    add("--data_dir", help="where the data set's files are, or are downloaded to")
    add("--skip", type=cli.positive_int, default=100, help="every skip-th test image: 0, skip, 2 skip, ...")
    add("--max", type=cli.positive_int, help="only images whose idx is below this")
    add("--N", type=cli.positive_int, default=CertifySettings.N, help="draws per image, at most if sequential")
    add("--share", type=cli.share, default=0.1, help="of N, what a way of fixed N draws; its time is scaled up to N")
    add("--consensus", type=cli.positive_int, default=2, metavar="C", help="heads that have to agree")
    add("--ways", nargs="*", choices=_WAYS, help="beside the authors' and the second (default: all)")
    add("--device", help="auto, cpu, cuda or cuda:<index>")
    arithmetic = "of our ways; auto: tf32 on CUDA, else fp32; the authors' is torch's own"
    add("--precision", choices=INFERENCE_PRECISIONS, help=arithmetic)
    add("--batch_size", type=cli.positive_int, help="noisy copies per batch of our ways")
    add("--plain_batch_size", type=cli.positive_int, default=128, help="noisy copies per batch of the authors' way")
    add("--seed", type=cli.seed, help="of our ways' draws")
    add("--json", type=Path, help="also write the figures there")
    defaults = cli.defaults_of(ClassifierSettings)
    parser.set_defaults(**{name: defaults[name] for name in _AS_CERTIFY})
    return parser.parse_args(given)


@dataclass(frozen=True)
class _Row:
    """A way's certificates, from the votes that it drew, and what the whole table takes it."""

    way: str
    run: Run
    counts: list[VoteCounts]
    draws: int
    seconds: float


def main(given: list[str]) -> None:
    """Print the table; `given` are the flags."""
    args = _flags(given)
    compiling = () if args.precision == "int8" else _COMPILING
    if "compiled" in (args.ways or ()) and not compiling:
        raise UserError("--precision int8 has nothing to compile: leave the way 'compiled' out")
    if args.ways is None:
        args.ways = [way for way in _WAYS if way != "compiled" or compiling]
    if args.json:
        make_folder(args.json.absolute().parent)  # before, not after, the measurements
    select_device(args.device, bool({*compiling} & {*args.ways}))  # raises without a compiler
    settings = ClassifierSettings((args.model_path,), **{name: getattr(args, name) for name in _AS_CERTIFY})
    evaluation = load(settings, args.N)
    few = math.ceil(args.N * args.share)
    _check(evaluation, few, args)
    device = torch.cuda.get_device_name(evaluation.device) if evaluation.device.type == "cuda" else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads", flush=True)

    heads = evaluation.config.heads.total
    second = _ours(evaluation.config.precision, settings, evaluation.split, args.N, args)
    rows = [_authors(evaluation, settings, second.run, few, args), second]
    for way in args.ways:
        options = _options(way, compiling, heads, args)
        if options is None:
            print(f"{way}: left out; K must be at least 2 and below the number of heads, {heads}")
            continue
        draws = args.N if "sequential" in options else few
        rows.append(_ours(way, settings, evaluation.split, draws, args, **options))

    radii = table_radii(largest_radius(second.run.required_config), second.run.dataset)[1:]
    table = pd.DataFrame([_figures(row, rows[0].seconds, radii) for row in rows])
    comparisons = {row.way: _compared(row, second, radii, args.seed) for row in rows if row is not second}
    print(
        f"\n{markdown(table)}\n\n{len(second.counts)} images. Against {second.way} at the same N, with 95 % intervals:"
    )
    for way, comparison in comparisons.items():
        print(f"- {way}: {_sentence(comparison)}")
    if args.json:
        content = {"device": device, "images": len(second.counts), "rows": records(table)}
        content["against_second_row"] = {way: records(one.table) for way, one in comparisons.items()}
        replace_file(args.json, json.dumps(content, indent=2) + "\n")


def _check(evaluation: Evaluation, few: int, args) -> None:
    """UserError, before anything is measured, where so few draws never certify or there are no two images."""
    largest_radius(replace(evaluation.config, N=few, alpha=CertifySettings.alpha))
    images = RunSettings(args.skip, args.max).chosen(range(len(evaluation.split)))
    if len(images) < 2:
        raise UserError(f"--skip {args.skip} and --max {args.max} choose one image: a comparison needs 2 or more")


def _options(way: str, compiling: tuple[str, ...], heads: int, args) -> dict | None:
    """What a way adds to certify_mhead.py's fixed N; None where there are too few heads for its consensus."""
    options = {}
    if way in compiling:
        options["compile"] = True
    if way in ("sequential", "together"):
        options["sequential"] = True
    if way in ("consensus", "together"):
        if 2 <= args.consensus < heads:
            options["consensus"] = args.consensus
        elif way == "consensus":
            return None
    return options


# --- the ways ---


def _ours(
    way: str, settings: ClassifierSettings, split: Split, draws: int, args, sequential: bool = False, **options
) -> _Row:
    """What certify_mhead.py does, its files in a folder that is removed."""
    settings = replace(settings, **options)
    evaluation = load(settings, draws, split)
    certification = CertifySettings(N=draws, sequential=sequential)
    image, _ = split[0]

    def begin() -> None:
        """Choose the size of a pass, and compile it."""
        network = evaluation.smooth.base_classifier
        set_pass_size(network, fastest_pass_size(network, image))
        evaluation.smooth.count_votes(image, evaluation.batch_size, evaluation.batch_size)

    _, first = _timed(begin)
    with tempfile.TemporaryDirectory() as folder:
        run = RunSettings(args.skip, args.max, logs_dir=folder)
        (files, _), seconds = _timed(lambda: certify_images(evaluation, settings, run, certification))
        (found,), counts = read_runs([files.log]), read_counts(files.counts)
    return _whole_table(way, found, counts, first, seconds, draws if sequential else args.N)


def _authors(evaluation: Evaluation, settings: ClassifierSettings, second: Run, draws: int, args) -> _Row:
    """The images of the second row, certified as the authors' code does it."""
    known = (settings.arch, settings.dataset, settings.num_heads, settings.noise_sd, settings.normalize)
    loaded = load_classifier(Path(args.model_path), *known)
    if loaded.normalize is None:
        loaded = loaded.normalised_by(evaluation.config.normalize[0])
    classifier, smooth = loaded.classifier.to(evaluation.device).eval(), evaluation.smooth
    config = replace(second.required_config, N=draws)

    def votes(image: Tensor, n: int) -> np.ndarray:
        """Of n noisy copies, [1, K]."""
        counts = np.zeros((1, smooth.num_classes), dtype=int)
        for begun in range(0, n, args.plain_batch_size):
            batch_size = min(args.plain_batch_size, n - begun)
            counts += plain_votes(classifier, image, smooth.sigma, batch_size, smooth.num_classes)
        return counts

    def certify() -> tuple[list[VoteCounts], Run]:
        """The votes of every image, and the log that they make."""
        counts = []
        for idx in second.log["idx"].tolist():
            image, label = evaluation.split[idx]
            counts.append(VoteCounts(idx, label, 0.0, votes(image, config.N0), votes(image, draws)))
        return counts, replace(second, log=log_table(counts, config), config=config)

    _, first = _timed(lambda: votes(evaluation.split[0][0], args.plain_batch_size))
    (counts, run), seconds = _timed(certify)
    return _whole_table("authors'", run, counts, first, seconds, args.N)


def _whole_table(way: str, run: Run, counts: list[VoteCounts], first: float, seconds: float, N: int) -> _Row:
    """The row of a run whose draws are scaled up to N per image, from `first` and all other seconds."""
    times = (run.required_config.N0 + N) / (run.required_config.N0 + run.required_config.N)
    draws = sum(one.draws for one in counts)
    row = _Row(way, run, counts, round(draws * times), first + seconds * times)
    print(f"{way}: {row.seconds:.1f} s, of which {first + seconds:.1f} s were measured", flush=True)
    return row


def _timed(work: Callable) -> tuple:
    """What the work returns, and its seconds; it ends with votes on the host, so that no device need be waited for."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


# --- the figures ---


def _figures(row: _Row, authors_seconds: float, radii: np.ndarray) -> dict:
    log, reached = row.run.log, radii <= largest_radius(row.run.required_config)
    accuracy = np.where(reached, certified_accuracy(log, radii), np.nan).tolist()
    figures = {"way": row.way, "N": row.run.required_config.N, "draws": row.draws, "seconds": row.seconds}
    figures |= {"ratio": authors_seconds / row.seconds}
    figures |= {"ACR": average_certified_radius(log), "SE": acr_standard_error(log)}
    figures["clean"] = float(certified_accuracy(log, [0])[0])
    return figures | dict(zip(radius_names(radii), accuracy, strict=True))


def _compared(row: _Row, second: _Row, radii: np.ndarray, seed: int) -> Comparison:
    """The row against the second one, whose votes are thinned to the row's N where they are more."""
    config, other = row.run.required_config, second.run
    if config.N < other.required_config.N:
        draws = np.random.default_rng(seed)
        few = [_thinned(one, config.N, draws) for one in second.counts]
        config = replace(other.required_config, N=config.N)
        other = replace(other, log=log_table(few, config), config=config)
    return compare(row.run, other, radii[radii <= largest_radius(config)])


def _thinned(counts: VoteCounts, n: int, draws: np.random.Generator) -> VoteCounts:
    """The ensemble's votes alone, of n of its estimation draws."""
    estimation = draws.multivariate_hypergeometric(counts.estimation[-1], n)
    return replace(counts, selection=counts.selection[-1:], estimation=estimation[None])


def _sentence(comparison: Comparison) -> str:
    """The difference of the ACRs, and at which radii certified accuracy agrees."""
    acr, *accuracies = comparison.table.to_dict("records")
    text = f"ACR {acr['difference']:+.4f}"
    if np.isnan(acr["difference"]):
        text = "ACR not compared, since it stopped early"
    elif np.isnan(acr["low"]):
        text += f" (no interval: the radii of {comparison.different} images differ)"
    else:
        text += f" ({acr['low']:+.4f} to {acr['high']:+.4f})"
    apart = [one for one in accuracies if one["low"] > 0 or one["high"] < 0]
    where = [f"{one['figure']} by {one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})" for one in apart]
    return f"{text}; certified accuracy " + (f"differs at {', '.join(where)}" if apart else "agrees at every radius")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
