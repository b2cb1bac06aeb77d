"""One certification run: votes of each image -> log -> summary."""

import sys
from dataclasses import dataclass, replace

from spacte import cli
from spacte.certify.chance import warn_at_chance
from spacte.certify.contract import SPOT_CHECK
from spacte.certify.evaluation import Evaluation
from spacte.certify.loading import load
from spacte.certify.record import about, decide_pass_size, note_pass_size
from spacte.certify.run_settings import RunSettings, add_run_flags
from spacte.certify.settings import ClassifierSettings, add_classifier_flags
from spacte.certify.writer import writing
from spacte.distributed import init_distributed, is_main_process
from spacte.logs.certified import check_certificate, largest_radius
from spacte.logs.config import RunConfig
from spacte.logs.plans import CertifyPlan, table_stopping
from spacte.logs.runfiles import RunFiles
from spacte.logs.voting import Stopping
from spacte.names import CERTIFICATIONS
from spacte.smooth.certificates import CERTIFICATES
from spacte.smooth.stopping import GIVE_UP
from spacte.utils import UserError


@dataclass(frozen=True)
class CertifySettings:
    """How images are certified; the flags of `parser_of` say what each field is."""

    N0: int = 100
    N: int = 100_000
    alpha: float = 0.001
    certificate: str = "cohen"
    skip_wrong: bool = False
    sequential: bool = False
    radii: list[float] | None = None
    tolerance: float | None = None
    give_up: float | None = None


def main(description: str) -> None:
    """The command line of certify_mhead.py."""
    cli.run_with_settings(parser_of(description), certify, ClassifierSettings, RunSettings, CertifySettings)


def certify(classifier: ClassifierSettings, run: RunSettings, settings: CertifySettings) -> None:
    """Certify test images as the settings say; leaves the log, its counts, its configuration and its summary.

    An interrupted run resumes after its last image. Raises UserError before anything is written if a
    setting, file or folder is wrong, and RunError if logits are not finite.
    """
    init_distributed()
    check_stopping(settings)
    evaluation = load(classifier, settings.N)
    files, table = certify_images(evaluation, classifier, run, settings)
    if is_main_process():
        print(f"{table}\nlog: {files.log}{_disagreement(files)}")


def _disagreement(files: RunFiles) -> str:
    """How often a consensus' first members disagreed, a line; nothing where the run's JSON does not say it."""
    noted = files.read_json()
    found = noted.about.get("consensus")
    if found is None:
        return ""
    share = f"{100 * found['share']:.1f} % of the {found['seen']} noisy copies"
    return f"\nthe first {noted.config.consensus} disagreed on {share}"


def certify_images(
    evaluation: Evaluation, classifier: ClassifierSettings, run: RunSettings, settings: CertifySettings
) -> tuple[RunFiles, str]:
    """Certify the evaluation's images; returns the run's files and, in the main process, the table of its summary."""
    config, classes = _config(evaluation, run, settings), evaluation.smooth.num_classes
    check_certificate(settings.certificate, classes)
    largest_radius(config, classes)  # raises where there is none
    plan = CertifyPlan(config)
    files = _files(f"{evaluation.run_name}-certify-skip-{run.skip}", config, run)
    indices = run.chosen(range(len(evaluation.split)))
    decide_pass_size(evaluation, files, classifier.images_per_pass, run.overwrite)

    with writing(files, plan, about(evaluation, classifier, run, settings), indices, run.overwrite) as writer:
        if writer.missing and is_main_process():
            if config.classifier is not None:  # the user's own
                print(SPOT_CHECK, file=sys.stderr)
            warn_at_chance(evaluation.smooth, evaluation.split)
        for counts in evaluation.count_votes("certify", writer.missing, plan.draws):
            writer.write(counts)
        if writer.missing:
            note_pass_size(evaluation, files)
    return files, writer.summary()


def _files(name: str, config: RunConfig, run: RunSettings) -> RunFiles:
    """The run's files: those of an older run without -sequential in its name, where it is this one and has begun."""
    kind = "" if config.certificate == "cohen" else f"-{config.certificate}"
    files = run.files(config, CERTIFICATIONS, name + "-sequential" * (config.sequential is not None) + kind)
    if config.sequential is not None and not files.json.exists():
        older = run.files(config, CERTIFICATIONS, name + kind)
        if older.json.exists() and not older.read_json().config.differences(config):
            return older
    return files


def parser_of(description: str) -> cli.Parser:
    """The flags of a certification run."""
    parser = cli.Parser(description)
    add_classifier_flags(parser)
    add_run_flags(parser)
    add = parser.add_argument_group("draws and certificate").add_argument
    add("--N0", type=cli.positive_int, help="draws that select the class")
    add("--N", type=cli.positive_int, help="draws that bound its probability, at most if --sequential")
    add("--alpha", type=cli.open_probability, help="probability that a certificate is wrong")
    add("--certificate", choices=CERTIFICATES, help="from the votes of the class alone (Cohen's), or from all votes")
    add("--skip_wrong", action="store_true", help="stop an image's draws if its selected class is not its label")
    add = parser.add_argument_group("fewer draws").add_argument
    add("--sequential", action="store_true", help="stop an image's draws early, with an anytime-valid bound")
    radii = "--sequential: stop when each is certified or given up (default: those of the table that N can reach)"
    add("--radii", type=cli.radius, nargs="+", help=radii)
    known = "--sequential: stop when the radius is known to within this, in units of [0, 1]"
    add("--tolerance", type=cli.positive_float, help=known)
    give_up = f"--sequential: level of the bound by which a radius is given up (default: {GIVE_UP:g})"
    add("--give_up", type=cli.open_probability, help=give_up)
    parser.set_defaults(**cli.defaults_of(CertifySettings))
    return parser


def _config(evaluation: Evaluation, run: RunSettings, settings: CertifySettings) -> RunConfig:
    """What the log's rows depend on."""
    config = replace(
        evaluation.config,
        kind="certify",
        skip=run.skip,
        N0=settings.N0,
        N=settings.N,
        alpha=settings.alpha,
        certificate=settings.certificate,
        skip_wrong=settings.skip_wrong,
    )
    return replace(config, sequential=_stopping(config, settings)) if settings.sequential else config


def _stopping(config: RunConfig, settings: CertifySettings) -> Stopping:
    """When draws end early."""
    if settings.tolerance is not None:
        return Stopping(tolerance=settings.tolerance)
    give_up = settings.give_up or GIVE_UP
    if settings.radii:
        return Stopping(tuple(sorted(settings.radii)), give_up)
    return table_stopping(config, give_up)


def check_stopping(settings: CertifySettings) -> None:
    """UserError if flags of two stopping rules are given, or one of sequential runs for another."""
    given = [name for name in ("radii", "tolerance", "give_up") if getattr(settings, name) is not None]
    if given and not settings.sequential:
        raise UserError(f"--{given[0]} says when to stop: it needs --sequential")
    if "tolerance" in given and len(given) > 1:
        other = next(name for name in given if name != "tolerance")
        raise UserError(f"--tolerance and --{other} belong to two rules for stopping: give one of them")
