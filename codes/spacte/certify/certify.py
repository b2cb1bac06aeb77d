"""One certification run: votes of each image -> log -> summary."""

import sys
from dataclasses import asdict, dataclass

from spacte import cli
from spacte.certify.contract import SPOT_CHECK
from spacte.certify.evaluation import Evaluation
from spacte.certify.settings import ClassifierSettings, RunSettings, add_classifier_flags, add_run_flags
from spacte.certify.writer import RunWriter
from spacte.distributed import all_gather_object, init_distributed, is_main_process
from spacte.logs import certlog
from spacte.logs.from_votes import certificate_of, certificate_row, certified, largest_radius, voter_of
from spacte.logs.runfiles import RunFiles
from spacte.logs.votes import VoteCounts
from spacte.report.runs import read_runs
from spacte.report.table import render, summary, table_radii
from spacte.report.votes import with_certificate
from spacte.smooth.certificates import CERTIFICATES
from spacte.smooth.draws import Draws
from spacte.smooth.stopping import AllVotesDecided, RadiiDecided, RadiusKnown
from spacte.smooth.voters import Consensus
from spacte.utils import UserError, replace_file


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

    def command() -> None:
        args = parser_of(description).parse_args()
        certify(*(cli.settings_of(kind, args) for kind in (ClassifierSettings, RunSettings, CertifySettings)))

    cli.run(command)


def certify(classifier: ClassifierSettings, run: RunSettings, settings: CertifySettings) -> None:
    """Certify test images as the settings say; leaves the log, its counts, its configuration and its summary.

    An interrupted run resumes after its last image. Raises UserError before anything is written where a
    setting, file or folder is wrong, and RunError where logits are not finite.
    """
    init_distributed()
    check_stopping(settings)
    evaluation = Evaluation.load(classifier, settings.N)
    files, table = certify_images(evaluation, classifier, run, settings)
    disagreement = _disagreement(evaluation.smooth.consensus)
    if is_main_process():
        print(f"{table}\nlog: {files.log}{disagreement}")


def _disagreement(consensus: Consensus | None) -> str:
    """How often the first members disagreed, over all processes since their start; nothing where nothing was drawn."""
    if consensus is None:
        return ""
    disagreed, seen = (
        sum(counts) for counts in zip(*all_gather_object((consensus.disagreed, consensus.seen)), strict=True)
    )
    if not seen:
        return ""
    share = f"{100 * disagreed / seen:.1f} % of the {seen} noisy copies that were drawn now"
    return f"\nthe first {consensus.first} disagreed on {share}"


def certify_images(
    evaluation: Evaluation, classifier: ClassifierSettings, run: RunSettings, settings: CertifySettings
) -> tuple[RunFiles, str]:
    """Certify the evaluation's images; returns the run's files and, in the main process, the table of its summary."""
    config, classes = _config(evaluation, run, settings), evaluation.smooth.num_classes
    check_certificate(settings.certificate, classes)
    largest_radius(config, classes)  # raises where there is none
    plan = CertifyPlan(config)
    name = f"{evaluation.run_name}-certify-skip-{run.skip}" + certificate_ending(settings.certificate)
    files = run.files(evaluation.folder(run.logs_dir, "certify-mhead"), name)
    indices = run.chosen(range(len(evaluation.split)))
    evaluation.fix_passes(files, run.overwrite)
    about = evaluation.about(classifier, run, settings)

    with RunWriter(files, plan, about, indices, run.overwrite) as writer:
        if writer.missing and is_main_process():
            if "parameters_sha256" in config:  # a classifier of the user's own
                print(SPOT_CHECK, file=sys.stderr)
            evaluation.warn_at_chance()
        for counts in evaluation.sample("certify", writer.missing, plan.draws):
            writer.write(counts)
    return files, plan.summarise(files) if is_main_process() else ""


class CertifyPlan:
    """What certification draws for an image, and what it makes of the votes, as the configuration says."""

    header, metric, from_line = certlog.HEADER, "ACR", VoteCounts.from_line

    def __init__(self, config: dict):
        self.config = config
        self.largest_radius = largest_radius(config)
        self._should_stop = _stopping_rule(config)

    def draws(self, label: int) -> Draws:
        """What is drawn for an image of that label."""
        only_class = label if self.config["skip_wrong"] else None
        return Draws(self.config["N0"], self.config["N"], voter_of(self.config), self._should_stop, only_class)

    def rows(self, counts: VoteCounts) -> str:
        """The image's line in the log."""
        return certificate_row(counts, self.config)

    def score(self, counts: VoteCounts) -> float:
        """What the image adds to the ACR: its radius where it is right."""
        predict, radius = certified(counts, self.config)
        return radius if predict == counts.label else 0.0

    def summarise(self, files: RunFiles) -> str:
        """Write ACR and certified accuracy at the radii that N draws can reach beside the log; returns the table.

        It has a row for each certificate, both from the same votes.
        """
        radii = table_radii(self.largest_radius, self.config["dataset"])[1:]
        (run,) = read_runs([files.log])
        both = [with_certificate(run, kind) for kind in CERTIFICATES]
        table = render(summary(both, radii), "markdown")
        replace_file(files.summary, lambda temporary: temporary.write_text(table + "\n", encoding="utf-8"))
        return table


def check_certificate(certificate: str, classes: int) -> None:
    """UserError where the certificate needs more classes."""
    if certificate == "all-votes" and classes < 2:
        raise UserError("--certificate all-votes needs at least 2 classes: take cohen")


def certificate_ending(certificate: str) -> str:
    """What a log's name ends in where its certificate is not Cohen's."""
    return "" if certificate == "cohen" else f"-{certificate}"


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
    add("--skip_wrong", action="store_true", help="draw no more for an image whose selected class is not its label")
    add = parser.add_argument_group("fewer draws").add_argument
    add("--sequential", action="store_true", help="stop an image's draws early, with an anytime-valid bound")
    radii = "--sequential: stop when each is certified or given up (the radii of the table that N can reach)"
    add("--radii", type=cli.non_negative_float, nargs="+", help=radii)
    known = "--sequential: stop when the radius is known to within this, in units of [0, 1]"
    add("--tolerance", type=cli.positive_float, help=known)
    give_up = "--sequential: level of the bound by which a radius is given up (0.01)"
    add("--give_up", type=cli.open_probability, help=give_up)
    parser.set_defaults(**cli.defaults_of(CertifySettings))
    return parser


def _config(evaluation: Evaluation, run: RunSettings, settings: CertifySettings) -> dict:
    """What the log's rows depend on."""
    names = ("N0", "N", "alpha", "certificate", "skip_wrong", "sequential")
    config = {"kind": "certify", **evaluation.config, "skip": run.skip}
    config |= {name: value for name, value in asdict(settings).items() if name in names}
    if settings.sequential:
        limit = largest_radius(config)
        config["sequential"] = _stopping(settings, limit, config["dataset"])
    else:
        config["sequential"] = None
    return config


def check_stopping(settings: CertifySettings) -> None:
    """UserError where flags of two stopping rules are given, or one of sequential runs for another."""
    given = [name for name in ("radii", "tolerance", "give_up") if getattr(settings, name) is not None]
    if given and not settings.sequential:
        raise UserError(f"--{given[0]} says when to stop: it needs --sequential")
    if "tolerance" in given and len(given) > 1:
        other = next(name for name in given if name != "tolerance")
        raise UserError(f"--tolerance and --{other} belong to two rules for stopping: give one of them")


def _stopping(settings: CertifySettings, limit: float, dataset: str) -> dict:
    """The stopping rule as the configuration records it."""
    if settings.tolerance is not None:
        return {"tolerance": settings.tolerance}
    radii = sorted(settings.radii) if settings.radii else table_radii(limit, dataset).tolist()
    return {"radii": radii, "give_up": settings.give_up or 0.01}


def _stopping_rule(config: dict):
    """What says, from the selection and the estimation votes [K], whether estimation may end; None where N is fixed."""
    stopping, n, sigma = config["sequential"], config["N"], config["noise_sd"]
    if stopping is None:
        return None
    certificate = certificate_of(config)
    if certificate.kind == "all-votes":
        return AllVotesDecided(certificate, n, **stopping)
    alpha = certificate.alpha
    if "tolerance" in stopping:
        rule = RadiusKnown(stopping["tolerance"], n, alpha, sigma)
    else:
        rule = RadiiDecided(stopping["radii"], n, alpha, sigma, stopping["give_up"])
    return lambda selection, estimation: rule(int(estimation[selection.argmax()]), int(estimation.sum()))
