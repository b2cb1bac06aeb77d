"""One prediction run: Cohen et al.'s PREDICT on each image -> log."""

from dataclasses import dataclass, replace

from spacte import cli
from spacte.certify.loading import load
from spacte.certify.record import about, decide_pass_size, note_pass_size
from spacte.certify.run_settings import RunSettings, add_run_flags
from spacte.certify.settings import ClassifierSettings, add_classifier_flags
from spacte.certify.writer import writing
from spacte.distributed import init_distributed, is_main_process
from spacte.logs.plans import PredictPlan


@dataclass(frozen=True)
class PredictSettings:
    """How images are predicted."""

    N: int = 100_000
    alpha: float = 0.001


def main(description: str) -> None:
    """The command line of predict_mhead.py."""
    cli.run_with_settings(_parser(description), predict, ClassifierSettings, RunSettings, PredictSettings)


def predict(classifier: ClassifierSettings, run: RunSettings, settings: PredictSettings) -> None:
    """Predict test images as the settings say; leaves a log `idx label predict correct time` and its counts.

    Raises UserError before anything is written if a setting, file or folder is wrong.
    """
    init_distributed()
    evaluation = load(classifier, settings.N)
    config = replace(evaluation.config, kind="predict", skip=run.skip, N=settings.N, alpha=settings.alpha)
    plan = PredictPlan(config)
    files = run.files(config, "predict-mhead", f"{evaluation.run_name}-predict-skip-{run.skip}")
    indices = run.chosen(range(len(evaluation.split)))
    decide_pass_size(evaluation, files, classifier.images_per_pass, run.overwrite)

    with writing(files, plan, about(evaluation, classifier, run, settings), indices, run.overwrite) as writer:
        for counts in evaluation.count_votes("predict", writer.missing, plan.draws):
            writer.write(counts)
        if writer.missing:
            note_pass_size(evaluation, files)
    if is_main_process():
        print(f"{writer.summary()}\nlog: {files.log}")


def _parser(description: str) -> cli.Parser:
    parser = cli.Parser(description)
    add_classifier_flags(parser)
    add_run_flags(parser)
    add = parser.add_argument_group("draws").add_argument
    add("--N", type=cli.positive_int, help="draws per image")
    add("--alpha", type=cli.open_probability, help="probability of a wrong prediction")
    parser.set_defaults(**cli.defaults_of(PredictSettings))
    return parser
