"""Attacking a smoothed classifier through its noise, to see which certificates hold out (all should)."""

import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from spacte import cli, subject
from spacte.certlog import elapsed, read_log
from spacte.core_mhead import ABSTAIN, prediction
from spacte.report import markdown
from spacte.runfiles import RunFiles, config_differences
from spacte.subject import Subject
from spacte.utils import UserError, make_folder, replace_file, sha256

COLUMNS = ("idx", "label", "predict", "radius", "attack_radius", "adversarial", "correct", "broken", "time")


def main(description: str) -> None:
    """The command line of attack_mhead.py."""
    cli.run(lambda: run(_flags(description).parse_args()))


def _flags(description: str) -> cli.Parser:
    parser = cli.Parser(description)
    add = parser.add_argument
    subject.add_flags(parser)
    add("--log", required=True, help="certification log: its images are attacked, its radii put to the test")
    add("--radii", required=True, type=cli.positive_float, nargs="+", help="L2 norms that an attack may have")
    add("--num_steps", type=cli.positive_int, default=20, help="gradient steps")
    add("--num_noise_vec", type=cli.positive_int, default=32, help="noise vectors a gradient is averaged over")
    add("--N", type=cli.positive_int, default=10_000, help="draws of the prediction under attack")
    add("--alpha", type=cli.open_probability, default=0.001, help="probability of a wrong prediction under attack")
    add("--overwrite", action="store_true", help="start the attack's log anew instead of going on where it ends")
    return parser


def run(args: Namespace) -> None:
    """Attack the log's images at every radius; prints and leaves empirical beside certified accuracy.

    An attack that was interrupted goes on after its last image. Raises UserError before anything is written where a
    flag, file or folder is wrong, and where the log is about other images.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("attack_mhead.py runs in one process: start it without torchrun")
    log = read_log(args.log)
    source = RunFiles(Path(args.log))
    target = subject.prepare(args, args.N)
    _check_same_classifier(source, target)
    chosen = log[(log["idx"] % args.skip == 0) & (log["idx"] < (args.max or len(target.split)))]
    if chosen.empty:
        raise UserError(f"none of the images of '{args.log}' is chosen by --skip and --max")
    for row in chosen.itertuples():
        if row.idx >= len(target.split) or target.split[row.idx][1] != row.label:
            raise UserError(f"'{args.log}' is about other images: its idx {row.idx} has label {row.label}")
    config = {"kind": "attack", **target.config, "log_sha256": sha256(source.log), "radii": sorted(set(args.radii))}
    config |= {name: getattr(args, name) for name in ("num_steps", "num_noise_vec", "N", "alpha")}
    files = RunFiles(make_folder(target.folder(args.logs_dir, "attack-mhead")) / f"{source.log.stem}-attack.log")
    table = _begun(files, config, target.about(args), args.overwrite)
    left = chosen[~chosen["idx"].isin(table["idx"])]
    for row in tqdm(left.itertuples(), total=len(left), unit="image", disable=None):
        rows = [_attack_image(target, row, radius, args) for radius in config["radii"]]
        table = pd.DataFrame([*table.itertuples(index=False), *rows], columns=list(COLUMNS))
        _write(files.log, table)  # whole after every image
    broken = table[table["broken"] == 1]
    for row in broken.itertuples():
        print(f"idx {row.idx}: the certificate of radius {row.radius} is broken at {row.attack_radius}")
    print(f"{markdown(accuracies(table))}\nlog: {files.log}")


def _begun(files: RunFiles, config: dict, about: dict, overwrite: bool) -> pd.DataFrame:
    """What the attack's log holds already; its configuration is noted."""
    if overwrite:
        for path in (files.log, files.json):
            path.unlink(missing_ok=True)
    files.check_configuration(config)
    table = pd.read_csv(files.log, sep="\t") if files.log.exists() else pd.DataFrame(columns=list(COLUMNS))
    files.write_json(config, about, len(table))
    return table


def _write(path: Path, table: pd.DataFrame) -> None:
    replace_file(path, lambda temporary: table.to_csv(temporary, sep="\t", index=False))


def _check_same_classifier(files: RunFiles, target: Subject) -> None:
    """UserError where the configuration beside the log, if there is one, is about another smoothed classifier."""
    if files.json.exists():
        earlier = files.read_json()["config"]
        names = ("checkpoint_sha256", "head", "noise_sd", "precision", "exact_noise", "data_sha256")
        differences = config_differences(
            *({name: config[name] for name in names} for config in (earlier, target.config))
        )
        if differences:
            raise UserError(f"'{files.log}' is about another classifier or other images: {differences}")


def accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """A row an attack radius: the images still right under attack, the certified ones, the broken certificates."""
    certified = (table["predict"] == table["label"]) & (table["radius"] >= table["attack_radius"])
    groups = table.assign(certified=certified).groupby("attack_radius")
    means = groups[["correct", "certified"]].mean().rename(columns={"correct": "empirical accuracy"})
    means = means.rename(columns={"certified": "certified accuracy"})
    return means.assign(broken=groups["broken"].sum(), images=groups.size()).reset_index()


def attack(
    logits_of: Callable[[Tensor], Tensor],
    image: Tensor,
    label: int,
    radius: float,
    sigma: float,
    steps: int,
    noises: int,
    generator: torch.Generator,
) -> Tensor:
    """Climb -log mean_j softmax(logits_of(x + sigma eps_j))[label] within the L2 ball of `radius` and [0, 1].

    logits_of: [N, C, H, W] -> [N, K]; image [C, H, W] -> [C, H, W]. Every step draws fresh noise and goes 2 radius /
    steps along the gradient. Source: Salman et al. (NeurIPS 2019), SmoothAdv-PGD, section 2.2.
    """
    point = image
    for _ in range(steps):
        point = point.detach().requires_grad_()
        noise = torch.randn((noises, *image.shape), device=image.device, generator=generator) * sigma
        probability = logits_of(point + noise).softmax(-1).mean(0)[label]
        (gradient,) = torch.autograd.grad(-probability.clamp(min=1e-20).log(), point)
        point = point.detach() + 2 * radius / steps * gradient / (gradient.norm() + 1e-12)
        offset = point - image
        point = (image + offset * (radius / offset.norm().clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)
    return point


def _attack_image(target: Subject, row, radius: float, args: Namespace) -> tuple:
    """One line of the attack's log: a certificate is broken where an attack within it gets another class predicted."""
    started = time.monotonic()
    image, label = target.split[row.idx]
    generator = target.generator("attack", row.idx)

    def logits_of(images: Tensor) -> Tensor:
        logits = target.smooth.base_classifier(images).float()  # [L, N, K]
        return logits.sum(0) if target.voter < 0 else logits[target.voter]

    moved = attack(logits_of, image, label, radius, target.sigma, args.num_steps, args.num_noise_vec, generator)
    if args.exact_noise:  # towards the image, onto the grid: the norm does not grow
        levels = target.split.spec.levels
        moved = ((image * levels).round() + ((moved - image) * levels).trunc()) / levels
    counts = target.smooth.count_votes(moved, args.N, args.batch_size, generator)[target.voter]
    adversarial = prediction(counts, args.alpha - target.config["noise_slack"])
    inside = float((moved - image).norm()) < row.radius
    broken = int(inside and row.predict != ABSTAIN and adversarial not in (row.predict, ABSTAIN))
    took = elapsed(time.monotonic() - started)
    return (row.idx, label, row.predict, row.radius, radius, adversarial, int(adversarial == label), broken, took)
