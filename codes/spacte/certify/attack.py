"""Attacking a smoothed classifier through its noise, to see which certificates hold (all should)."""

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spacte import cli
from spacte.certify.base import IDENTITY
from spacte.certify.contract import check_gradient
from spacte.certify.evaluation import Evaluation
from spacte.certify.predict import check_deciding
from spacte.certify.settings import ClassifierSettings, RunSettings, add_classifier_flags, add_run_flags, shard_ending
from spacte.certify.writer import RunWriter
from spacte.distributed import init_distributed, is_main_process
from spacte.logs.certlog import elapsed
from spacte.logs.from_votes import voter_of
from spacte.logs.runfiles import RunFiles, config_differences
from spacte.logs.votes import dense, parsed, sparse
from spacte.model.ensemble import with_ensemble
from spacte.model.noisy import pgd
from spacte.report.run import Run
from spacte.report.runs import read_runs
from spacte.report.table import markdown
from spacte.smooth.certificates import ABSTAIN, prediction
from spacte.smooth.draws import Draws
from spacte.smooth.tally import Sample
from spacte.utils import UserError, sha256

COLUMNS = ("idx", "label", "predict", "radius", "attack_radius", "adversarial", "correct", "broken", "time")


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

    def command() -> None:
        args = _parser(description).parse_args()
        attack(*(cli.settings_of(kind, args) for kind in (ClassifierSettings, RunSettings, AttackSettings)))

    cli.run(command)


def attack(classifier: ClassifierSettings, run: RunSettings, settings: AttackSettings) -> None:
    """Attack the log's images at every radius; prints and leaves empirical beside certified accuracy.

    An interrupted attack resumes after its last image. Raises UserError before anything is written where a
    setting, file or folder is wrong, and where the log is about other images.
    """
    init_distributed()
    source = RunFiles(Path(settings.log))
    if source.log.is_dir():
        raise UserError(f"--log '{source.log}' is a folder: give a certification log")
    (logged,) = read_runs([source.log])
    certified = logged.log.set_index("idx")
    evaluation = Evaluation.load(classifier, settings.N)
    _check_same_classifier(logged, evaluation)
    indices = run.chosen(sorted(certified.index))
    _check_same_images(source, certified.loc[indices], evaluation)
    if "classifier" in evaluation.config:  # the user's own
        check_gradient(evaluation.smooth.base_classifier, evaluation.split[indices[0]][0].expand(8, -1, -1, -1))
    config = {"kind": "attack", **evaluation.config, "skip": run.skip, "log_sha256": sha256(source.log)}
    config |= {name: value for name, value in asdict(settings).items() if name != "log"}
    plan = AttackPlan(config | {"radii": sorted(set(settings.radii)), "climbs_from": "certified class"})
    folder = evaluation.folder(run.logs_dir, "attack-mhead")
    files = RunFiles(folder / f"{source.log.stem}-attack{shard_ending(run.shard)}.log")

    evaluation.fix_passes(files, run.overwrite)
    about = evaluation.about(classifier, run, settings)
    about["attacked"] = len(replace(run, shard=None).chosen(certified.index))  # by all shards
    with RunWriter(files, plan, about, indices, run.overwrite) as writer:
        for counts in attacked(evaluation, plan.config, certified, writer.missing):
            writer.write(counts)
    if is_main_process():
        print(f"{plan.summarise(files)}\nlog: {files.log}")


@dataclass(frozen=True)
class AttackCounts:
    """What was counted on one image under attack: for each attack radius the moved image's votes [V, K].

    `predict` and `radius` are the certificate that is put to the test; `norms` and `seconds_each` [R] are the L2 norms
    that the attacks reached and the time they took.
    """

    idx: int
    label: int
    predict: int
    radius: float
    norms: list[float]
    votes: list[np.ndarray]
    seconds_each: list[float]

    def to_line(self) -> str:
        """One JSON line."""
        fields = {"idx": self.idx, "label": self.label, "seconds": round(sum(self.seconds_each), 6)}
        fields |= {"classes": self.votes[0].shape[1], "predict": self.predict, "radius": self.radius}
        attacks = zip(self.norms, self.seconds_each, self.votes, strict=True)
        attacks = [{"norm": norm, "seconds": round(took, 6), "votes": sparse(votes)} for norm, took, votes in attacks]
        return json.dumps(fields | {"attacks": attacks}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "AttackCounts":
        """The inverse of `to_line`. Raises UserError where the line is not a count of an attack."""
        fields = parsed(line)
        try:
            norms, took = ([float(one[name]) for one in fields["attacks"]] for name in ("norm", "seconds"))
            votes = [dense(one["votes"], fields["classes"]) for one in fields["attacks"]]
            predict, radius = int(fields["predict"]), float(fields["radius"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a vote count of an attack: {error}") from error
        return cls(fields["idx"], fields["label"], predict, radius, norms, votes, took)


class AttackPlan:
    """What an attack makes of the votes on an attacked image; all of it follows from the configuration.

    A certificate is broken where an attack within its radius gets another class predicted. An image is right under
    attack where its label is predicted, unless another class was certified: then it is wrong without an attack.
    Raises UserError where not even unanimous votes would decide.
    """

    header, metric, from_line = "\t".join(COLUMNS) + "\n", "empirical accuracy", AttackCounts.from_line

    def __init__(self, config: dict):
        self.config = config
        check_deciding(config)

    def rows(self, counts: AttackCounts) -> str:
        """The image's lines in the log, one per radius."""
        attacks = zip(self.config["radii"], self._predicted(counts), counts.norms, counts.seconds_each, strict=True)
        lines = []
        for attack_radius, adversarial, norm, took in attacks:
            inside = norm < counts.radius
            broken = inside and counts.predict != ABSTAIN and adversarial not in (counts.predict, ABSTAIN)
            certificate = (counts.idx, counts.label, counts.predict, counts.radius)
            result = (attack_radius, adversarial, int(_is_right(adversarial, counts)), int(broken), elapsed(took))
            lines.append("\t".join(map(str, certificate + result)) + "\n")
        return "".join(lines)

    def score(self, counts: AttackCounts) -> float:
        """What the image adds to the empirical accuracy at the largest radius."""
        return float(_is_right(self._predicted(counts)[-1], counts))

    def summarise(self, files: RunFiles) -> str:
        """The broken certificates by name, and the table of `accuracies`."""
        table = pd.read_csv(files.log, sep="\t")
        broken = [
            f"idx {row.idx}: the certificate of radius {row.radius} is broken at {row.attack_radius}\n"
            for row in table[table["broken"] == 1].itertuples()
        ]
        return "".join(broken) + markdown(accuracies(table))

    def _predicted(self, counts: AttackCounts) -> list[int]:
        voter, alpha = voter_of(self.config), self.config["alpha"] - self.config["noise_slack"]
        return [prediction(votes[voter], alpha) for votes in counts.votes]


def _is_right(adversarial: int, counts: AttackCounts) -> bool:
    return adversarial == counts.label and counts.predict in (counts.label, ABSTAIN)


def attacked(
    evaluation: Evaluation, config: dict, certified: pd.DataFrame, indices: Iterable[int]
) -> Iterator[AttackCounts]:
    """The votes on each image, moved at each of the radii; `certified` is the certification log by idx.

    The attack climbs from the class that is certified, else from the label: only so can it break a certificate on a
    wrong class. On a consensus it climbs the summed logits of the first K, which decide mostly.
    """
    heads, consensus = config["num_heads"], config.get("consensus")
    first = sum(heads[:consensus]) if len(heads) > 1 else consensus  # heads that climb, of networks all of theirs

    def voting(images: Tensor) -> Tensor:
        logits = evaluation.smooth.base_classifier(images)[:first]
        return with_ensemble(logits)[voter_of(config)].unsqueeze(0)  # [1, N, K]

    for idx in indices:
        image, label = evaluation.split[idx]
        claim, generator = certified.loc[idx], evaluation.generator("attack", idx)
        predict, norms, votes, seconds = int(claim["predict"]), [], [], []
        for radius in config["radii"]:
            started = time.monotonic()
            climbed = label if predict == ABSTAIN else predict
            moved = through_noise(
                voting, image, climbed, radius, evaluation.smooth.sigma, config["num_steps"], config["num_noise_vec"],
                generator,
            )  # fmt: skip
            if config["exact_noise"]:  # towards the image, onto the grid: the norm does not grow
                levels = evaluation.split.spec.levels
                moved = ((image * levels).round() + ((moved - image) * levels).trunc()) / levels
            sample = Sample(moved, generator, Draws(0, config["N"]), idx)
            votes += [drawn.estimation for drawn in evaluation.smooth.sample([sample], evaluation.batch_size)]
            norms.append(float((moved - image).norm()))
            seconds.append(time.monotonic() - started)
        yield AttackCounts(idx, label, predict, float(claim["radius"]), norms, votes, seconds)


def through_noise(
    logits_of, image: Tensor, climbed: int, radius: float, sigma: float, steps: int, noises: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """The image [C, H, W] moved by at most `radius` in L2 so that the class `climbed` loses votes.

    PGD on -log mean_j softmax(logits_of(x + sigma eps_j))[climbed], logits_of: [N, C, H, W] -> [L, N, K]: every step
    draws fresh noise and goes 2 radius / steps. Source: Salman et al. (NeurIPS 2019), SmoothAdv-PGD, section 2.2.
    """

    def fresh() -> Tensor:
        return torch.randn((noises, 1, *image.shape), device=image.device, generator=generator) * sigma

    label = torch.tensor([climbed], device=image.device)
    *_, moved = pgd(logits_of, image.unsqueeze(0), label, fresh, steps, 2 * radius / steps, radius)
    return moved.squeeze(0)


def accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """A row per attack radius: the images still right under attack, the certified ones, the broken certificates."""
    certified = (table["predict"] == table["label"]) & (table["radius"] >= table["attack_radius"])
    groups = table.assign(certified=certified).groupby("attack_radius")
    means = groups[["correct", "certified"]].mean().rename(columns={"correct": "empirical accuracy"})
    means = means.rename(columns={"certified": "certified accuracy"})
    return means.assign(broken=groups["broken"].sum(), images=groups.size()).reset_index()


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
    defaults = cli.defaults_of(AttackSettings)
    parser.set_defaults(**{name: defaults[name] for name in ("num_steps", "num_noise_vec", "N", "alpha")})
    return parser


def _check_same_classifier(logged: Run, evaluation: Evaluation) -> None:
    """UserError where the configuration beside the log is about another smoothed classifier; a warning without one."""
    if logged.config is None:
        sigma = evaluation.smooth.sigma
        other = (
            f", and its path says sigma {logged.sigma:g}, not {sigma:g}" if logged.sigma not in (None, sigma) else ""
        )
        warnings.warn(
            f"no configuration lies beside '{logged.path}': whether it is about this classifier is not checked{other}",
            stacklevel=1,
        )
        return
    names = (*IDENTITY, "head", "consensus", "noise_sd", "precision", "exact_noise", "data_sha256")
    differences = config_differences(
        *({name: config.get(name) for name in names} for config in (logged.config, evaluation.config))
    )
    if differences:
        raise UserError(f"'{logged.path}' is about another classifier or other images: {differences}")


def _check_same_images(files: RunFiles, certified: pd.DataFrame, evaluation: Evaluation) -> None:
    """UserError where the split has another label at an idx of the log, or not so many images."""
    for idx, label in certified["label"].items():
        if idx >= len(evaluation.split) or evaluation.split.label(idx) != label:
            raise UserError(f"'{files.log}' is about other images: its idx {idx} has label {label}")
