"""Which smoothed classifier is evaluated, and the flags that say so."""

from argparse import ArgumentTypeError
from dataclasses import dataclass

from spacte import cli
from spacte.data.spec import DATASETS
from spacte.model import LEGAL_ARCHITECTURES
from spacte.model.normalisation import NORMALISATIONS, parse_constants
from spacte.precision import INFERENCE_PRECISIONS
from spacte.utils import UserError


@dataclass(frozen=True)
class ClassifierSettings:
    """Which classifier, which data, and how it is computed; the flags of `add_classifier_flags` say what each is."""

    model_path: tuple[str, ...] = ()
    classifier: str | None = None
    classifier_args: tuple[str, ...] = ()
    normalize: str = "auto"
    arch: str | None = None
    dataset: str | None = None
    num_heads: int | None = None
    noise_sd: float | None = None
    head: int | None = None
    consensus: int | None = None
    data_dir: str = "./data"
    batch_size: int | None = None
    images_per_pass: int | None = None
    seed: int = 0
    exact_noise: bool = False
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False


def add_classifier_flags(parser: cli.Parser) -> None:
    """The flags of ClassifierSettings."""
    group = parser.add_argument_group("the classifier and its data")
    add, which = group.add_argument, group.add_mutually_exclusive_group(required=True)
    paths = "checkpoint, ours or a published one; the logits of several are summed (an ensemble)"
    which.add_argument("--model_path", nargs="+", help=paths)
    logits = "images [N, C, H, W] in [0, 1] -> logits [N, K], [L, N, K]"
    function = f"a function of yours that returns a module or another callable: {logits}"
    which.add_argument("--classifier", metavar="FILE.py:FUNCTION", help=function)
    literals = "the function's arguments; a value is a literal of Python, else text"
    add("--classifier_args", nargs="+", metavar="KEY=VALUE", help=literals)
    layer = "a published checkpoint's normalisation: mean_std, centre, none, or m,m,m/s,s,s for (x - m) / s;"
    add("--normalize", type=_normalisation, help=f"{layer} auto infers it from the data")
    known = "as in the checkpoint; published ones do not say"
    add("--arch", help=f"one of {LEGAL_ARCHITECTURES} (default: as in the checkpoint; the authors' do not say)")
    add("--dataset", help=f"one of {', '.join(DATASETS)} ({known})")
    add("--data_dir", help="where the data set's files are, or are downloaded to")
    add("--num_heads", type=cli.positive_int, help="L (default: as in the checkpoint)")
    add("--noise_sd", type=cli.image_norm, help=f"sigma, in units of [0, 1], training's or another ({known})")
    add("--head", type=cli.non_negative_int, help="this head alone votes, from 0 (default: the sum of all)")
    few = "the first C heads (networks, of an ensemble) vote; the others see only noisy copies on which these disagree"
    add("--consensus", type=cli.positive_int, metavar="C", help=few)
    add = parser.add_argument_group("how its logits are computed").add_argument
    add(
        "--batch_size",
        type=cli.positive_int,
        help="noisy images per batch (default: 1000; on a GPU up to 4096, fewer if large)",
    )
    passes = "of a batch, how many go through the network at once on a CPU (default: measured when the run begins)"
    add("--images_per_pass", type=cli.positive_int, help=passes)
    add(
        "--seed",
        type=cli.seed,
        help="the noise of image idx follows from script, seed, idx; on a GPU, its model and batch size",
    )
    add("--exact_noise", action="store_true", help="noise on the data's grid: sound in floating point, slower")
    add("--device", help="auto, cpu, cuda or cuda:<index>")
    arithmetic = "auto: tf32 on CUDA (convolutions only), else fp32; int8: a quantised network, the fastest on a CPU"
    add("--precision", choices=INFERENCE_PRECISIONS, help=arithmetic)
    add("--compile", action="store_true", help="through torch.compile: a minute at the first start, then faster")
    parser.set_defaults(**cli.defaults_of(ClassifierSettings))


def _normalisation(text: str) -> str:
    if text not in ("auto", *NORMALISATIONS):
        try:
            parse_constants(text)
        except UserError as error:
            raise ArgumentTypeError(str(error)) from None
    return text
