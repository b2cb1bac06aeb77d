"""Attacking a smoothed classifier through its noise, to see which certificates hold (all should)."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from spacte import cli
from spacte.certify.contract import check_gradient
from spacte.certify.evaluation import Evaluation
from spacte.certify.loading import load
from spacte.certify.record import about, decide_pass_size, note_pass_size
from spacte.certify.run_settings import RunSettings, add_run_flags
from spacte.certify.settings import ClassifierSettings, add_classifier_flags
from spacte.certify.writer import writing
from spacte.data.splits import Split
from spacte.distributed import init_distributed, is_main_process
from spacte.files import sha256
from spacte.logs.certlog import read_table
from spacte.logs.config import IDENTIFIES, RunConfig
from spacte.logs.counts import AttackCounts
from spacte.logs.description import check_certification_log, description
from spacte.logs.plans import AttackPlan
from spacte.logs.runfiles import RunFiles
from spacte.model.ascent import pgd
from spacte.model.ensemble import with_ensemble
from spacte.smooth.certificates import ABSTAIN
from spacte.smooth.draws import Draws
from spacte.smooth.tally import VoteRequest
from spacte.utils import UserError


@dataclass(frozen=True)
class AttackSettings:
    """How the images of a certification log are attacked; the flags of `_parser` say what each field is."""

    log: str
    radii: list[float]
    num_steps: int = 20
    num_noise_vec: int = 32
    N: int = 10_000
    alpha: float = 0.001


def main(description: str) -> None:
    """The command line of attack_mhead.py."""
    cli.run_with_settings(_parser(description), attack, ClassifierSettings, RunSettings, AttackSettings)


def attack(classifier: ClassifierSettings, run: RunSettings, settings: AttackSettings) -> None:
    """Attack the log's images at every radius; prints and leaves empirical beside certified accuracy.

    An interrupted attack resumes after its last image. Raises UserError before anything is written if a
    setting, file or folder is wrong, and where the log is about other images.
    """
    init_distributed()
    source = RunFiles(Path(settings.log))
    if source.log.is_dir():
        raise UserError(f"--log '{source.log}' is a folder: give a certification log")
    check_certification_log(source.log)
    if source.json.exists() and source.read_json().config.top_k is not None:
        raise UserError(f"'{source.log}' certifies more than one class (--top_k): give the log that it was made from")
    certified = read_table(source.log).set_index("idx")
    evaluation = load(classifier, settings.N)
    _check_same_classifier(source.log, evaluation.config)
    indices = run.chosen(sorted(certified.index))
    _check_same_images(source.log, certified.loc[indices], evaluation.split)
    if evaluation.config.precision == "int8" and is_main_process():
        print("int8 has no gradient: the float32 network is attacked, the int8 network votes", file=sys.stderr)
    if evaluation.config.classifier is not None:  # the user's own
        check_gradient(evaluation.smooth.base_classifier, evaluation.split[indices[0]][0].expand(8, -1, -1, -1))
    plan = AttackPlan(_config(evaluation, run, settings))
    files = run.files(plan.config, "attack-mhead", f"{source.log.stem}-attack")
    decide_pass_size(evaluation, files, classifier.images_per_pass, run.overwrite)
    noted = about(evaluation, classifier, run, settings)
    noted["attacked"] = len(replace(run, shard=None).chosen(certified.index))  # by all shards

    with writing(files, plan, noted, indices, run.overwrite) as writer:
        for counts in attacked(evaluation, plan.config, certified, writer.missing):
            writer.write(counts)
        if writer.missing:
            note_pass_size(evaluation, files)
    if is_main_process():
        print(f"{writer.summary()}\nlog: {files.log}")


def _config(evaluation: Evaluation, run: RunSettings, settings: AttackSettings) -> RunConfig:
    """What the log's rows depend on."""
    return replace(
        evaluation.config,
        kind="attack",
        skip=run.skip,
        log_sha256=sha256(Path(settings.log)),
        radii=tuple(sorted(set(settings.radii))),
        num_steps=settings.num_steps,
        num_noise_vec=settings.num_noise_vec,
        N=settings.N,
        alpha=settings.alpha,
        climbs_from="certified class",
    )


def attacked(
    evaluation: Evaluation, config: RunConfig, certified: pd.DataFrame, indices: Iterable[int]
) -> Iterator[AttackCounts]:
    """The votes on each image, moved at each of the radii; `certified` is the certification log by idx.

    The attack raises the loss of the certified class, or of the label where nothing was certified: only so can it break
    a certificate of a wrong class. A consensus is attacked through the summed logits of its first C members, which
    usually decide.
    """
    heads, consensus = config.num_heads, config.consensus
    # how many heads' logits are attacked; for a consensus of networks, all heads of the first ones
    first = sum(heads[:consensus]) if len(heads) > 1 else consensus

    def voting(images: Tensor) -> Tensor:
        logits = evaluation.smooth.base_classifier(images)[:first]
        return with_ensemble(logits)[config.heads.voter].unsqueeze(0)  # [1, N, K]

    for idx in indices:
        image, label = evaluation.split[idx]
        claim, generator = certified.loc[idx], evaluation.generator("attack", idx)
        predict, norms, votes, seconds = int(claim["predict"]), [], [], []
        for radius in config.radii:
            started = time.monotonic()
            attacked_class = label if predict == ABSTAIN else predict
            moved = through_noise(
                voting, image, attacked_class, radius, evaluation.smooth.sigma, config.num_steps, config.num_noise_vec,
                generator,
            )  # fmt: skip
            if config.exact_noise:  # towards the image, onto the grid: the norm does not grow
                levels = evaluation.split.spec.levels
                moved = ((image * levels).round() + ((moved - image) * levels).trunc()) / levels
            request = VoteRequest(moved, generator, Draws(0, config.N), idx)
            (drawn,) = evaluation.smooth.count_many([request], evaluation.batch_size)
            votes.append(drawn.estimation)
            norms.append(float((moved - image).norm()))
            seconds.append(time.monotonic() - started)
        yield AttackCounts(idx, label, predict, float(claim["radius"]), norms, votes, seconds)


def through_noise(
    logits_of: Callable[[Tensor], Tensor], image: Tensor, attacked_class: int, radius: float, sigma: float, steps: int,
    num_noise_vec: int, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """The image [C, H, W] moved by at most `radius` in L2 so that the class `attacked_class` loses votes.

    PGD on -log mean_j softmax(logits_of(x + sigma eps_j))[attacked_class], logits_of: [N, C, H, W] -> [L, N, K]: every
    step draws fresh noise and goes 2 radius / steps. Source: Salman et al. (NeurIPS 2019), SmoothAdv-PGD, section 2.2.
    """

    def fresh() -> Tensor:
        return torch.randn((num_noise_vec, 1, *image.shape), device=image.device, generator=generator) * sigma

    label = torch.tensor([attacked_class], device=image.device)
    *_, moved = pgd(logits_of, image.unsqueeze(0), label, fresh, steps, 2 * radius / steps, radius)
    return moved.squeeze(0)


def _parser(description: str) -> cli.Parser:
    parser = cli.Parser(description)
    add_classifier_flags(parser)
    add_run_flags(parser)
    add = parser.add_argument_group("the attack").add_argument
    add("--log", required=True, help="certification log: its images are attacked, its radii put to the test")
    add("--radii", required=True, type=cli.positive_float, nargs="+", help="L2 norms that an attack may have")
    add("--num_steps", type=cli.positive_int, help="gradient steps")
    add("--num_noise_vec", type=cli.positive_int, help="noise vectors a gradient is averaged over")
    add("--N", type=cli.positive_int, help="draws of the prediction under attack")
    add("--alpha", type=cli.open_probability, help="probability of a wrong prediction under attack")
    parser.set_defaults(**cli.defaults_of(AttackSettings))
    return parser


def _check_same_classifier(log: Path, config: RunConfig) -> None:
    """UserError if the configuration beside the log is about another smoothed classifier; a warning without one."""
    known = description(log)
    if known.config is None:
        elsewhere = known.sigma not in (None, config.noise_sd)
        other = f", and its path says sigma {known.sigma:g}, not {config.noise_sd:g}" if elsewhere else ""
        text = f"no configuration lies beside '{log}': whether it is about this classifier is not checked{other}"
        warnings.warn(text, stacklevel=1)
        return
    differences = known.config.differences(config, IDENTIFIES)
    if differences:
        raise UserError(f"'{log}' is about another classifier or other images: {differences}")


def _check_same_images(log: Path, certified: pd.DataFrame, split: Split) -> None:
    """UserError if the split has another label at an idx of the log, or fewer images."""
    for idx, label in certified["label"].items():
        if idx >= len(split) or split.label(idx) != label:
            raise UserError(f"'{log}' is about other images: its idx {idx} has label {label}")
