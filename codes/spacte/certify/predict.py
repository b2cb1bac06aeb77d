"""One prediction run: Cohen et al.'s PREDICT on each image -> log."""

from dataclasses import asdict, dataclass

from spacte import cli
from spacte.certify.evaluation import Evaluation
from spacte.certify.settings import ClassifierSettings, RunSettings, add_classifier_flags, add_run_flags
from spacte.certify.writer import RunWriter
from spacte.distributed import init_distributed, is_main_process
from spacte.logs.certlog import elapsed, read_log
from spacte.logs.from_votes import voter_of
from spacte.logs.runfiles import RunFiles
from spacte.logs.votes import VoteCounts
from spacte.smooth.certificates import ABSTAIN, fewest_deciding_votes, prediction
from spacte.smooth.draws import Draws
from spacte.utils import UserError

COLUMNS = ("idx", "label", "predict", "correct", "time")


@dataclass(frozen=True)
class PredictSettings:
    """How images are predicted."""

    N: int = 100_000
    alpha: float = 0.001


def main(description: str) -> None:
    """The command line of predict_mhead.py."""

    def command() -> None:
        """Parse the flags and predict; UserError where one is wrong."""
        parser = cli.Parser(description)
        add_classifier_flags(parser)
        add_run_flags(parser)
        add = parser.add_argument_group("draws").add_argument
        add("--N", type=cli.positive_int, help="draws per image")
        add("--alpha", type=cli.open_probability, help="probability of a wrong prediction")
        parser.set_defaults(**cli.defaults_of(PredictSettings))
        args = parser.parse_args()
        predict(*(cli.settings_of(kind, args) for kind in (ClassifierSettings, RunSettings, PredictSettings)))

    cli.run(command)


def predict(classifier: ClassifierSettings, run: RunSettings, settings: PredictSettings) -> None:
    """Predict test images as the settings say; leaves a log `idx label predict correct time` and its counts.

    Raises UserError before anything is written where a setting, file or folder is wrong.
    """
    init_distributed()
    evaluation = Evaluation.load(classifier, settings.N)
    plan = PredictPlan({"kind": "predict", **evaluation.config, "skip": run.skip, **asdict(settings)})
    files = run.files(
        evaluation.folder(run.logs_dir, "predict-mhead"), f"{evaluation.run_name}-predict-skip-{run.skip}"
    )
    indices = run.chosen(range(len(evaluation.split)))
    evaluation.fix_passes(files, run.overwrite)
    about = evaluation.about(classifier, run, settings)

    with RunWriter(files, plan, about, indices, run.overwrite) as writer:
        for counts in evaluation.sample("predict", writer.missing, plan.draws):
            writer.write(counts)
    if is_main_process():
        print(f"{plan.summarise(files)}\nlog: {files.log}")


class PredictPlan:
    """What prediction draws for an image, and what it makes of the votes; all of it follows from the configuration.

    Raises UserError where not even unanimous votes would decide.
    """

    header, metric, from_line = "\t".join(COLUMNS) + "\n", "accuracy", VoteCounts.from_line

    def __init__(self, config: dict):
        self.config = config
        check_deciding(config)

    def draws(self, label: int) -> Draws:
        """What is drawn for an image: nothing is selected."""
        return Draws(0, self.config["N"])

    def rows(self, counts: VoteCounts) -> str:
        """The image's line in the log."""
        predict = self._predicted(counts)
        columns = (counts.idx, counts.label, predict, int(predict == counts.label), elapsed(counts.seconds))
        return "\t".join(map(str, columns)) + "\n"

    def score(self, counts: VoteCounts) -> float:
        """What the image adds to the accuracy."""
        return float(self._predicted(counts) == counts.label)

    def summarise(self, files: RunFiles) -> str:
        """Images, accuracy and abstentions of a prediction log, in a line."""
        log = read_log(files.log, COLUMNS)
        abstained = (log["predict"] == ABSTAIN).mean()
        return f"{len(log)} images  accuracy {log['correct'].mean():.3f}  abstained {abstained:.3f}"

    def _predicted(self, counts: VoteCounts) -> int:
        return prediction(counts.estimation[voter_of(self.config)], self.config["alpha"] - self.config["noise_slack"])


def check_deciding(config: dict) -> None:
    """UserError where N draws can never decide a prediction at the configuration's alpha."""
    n, alpha = config["N"], config["alpha"]
    fewest = fewest_deciding_votes(alpha - config["noise_slack"])
    if fewest is None:
        raise UserError(f"--alpha {alpha} is below what --exact_noise costs at --N {n}: take a larger alpha")
    if n < fewest:
        raise UserError(f"--N {n} at --alpha {alpha} can never decide: even {n} votes of {n} abstain; take {fewest}")
