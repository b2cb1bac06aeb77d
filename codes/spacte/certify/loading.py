"""An evaluation from settings: what they name is loaded, checked and put together.

checkpoints -> classifier -> frozen -> Smooth
FILE.py:function -> classifier -> checked -> Smooth
"""

from dataclasses import replace
from pathlib import Path

from spacte.certify.base_classifier import (
    BaseClassifier,
    ComputeSettings,
    base_from_callable,
    base_from_checkpoints,
    joint_config,
)
from spacte.certify.evaluation import Evaluation
from spacte.certify.settings import ClassifierSettings
from spacte.data.sources import open_split
from spacte.data.spec import DATASETS, DataSpec
from spacte.data.splits import Split
from spacte.device import select_device
from spacte.distributed import main_process_first
from spacte.files import sha256
from spacte.logs.config import RunConfig
from spacte.model import foreign
from spacte.model.checkpoint import load_classifier
from spacte.model.int8 import check_exact
from spacte.model.members import HasMembers
from spacte.names import printable_name
from spacte.precision import arithmetic, select_precision
from spacte.provenance import deciding_versions, package_versions
from spacte.smooth.noise import GaussianNoise, GridNoise
from spacte.smooth.smooth import Smooth
from spacte.utils import UserError


def load(settings: ClassifierSettings, draws: int, split: Split | None = None) -> Evaluation:
    """Load what the settings name; `draws` is how many noisy copies of an image a claim rests on.

    A `split` that is given is evaluated in place of the test split, and must be of the classifier's images. Raises
    UserError if a setting, file or folder is wrong, the checkpoints do not belong together, or the user's own
    classifier does not keep the contract.
    """
    computing = compute_settings(settings, draws)
    if settings.classifier is not None:
        base, split = _from_function(settings.classifier, settings, computing, split)
        return evaluation_of(base, split, settings, computing)
    if settings.classifier_args:
        raise UserError("--classifier_args are a function's: they need --classifier FILE.py:function")
    known = (settings.arch, settings.dataset, settings.num_heads, settings.noise_sd, settings.normalize)
    if split is None and settings.dataset == "ImageFolder":  # a published checkpoint does not know its images
        split = _test_split("ImageFolder", settings, computing, None)
    images_spec = None if split is None else split.spec
    networks = [load_classifier(Path(path), *known, images_spec) for path in settings.model_path]
    config, spec = joint_config(networks), networks[0].spec
    if split is None:
        split = _test_split(config.dataset, settings, computing, spec)
    else:
        try:
            split = split.with_spec(spec)
        except UserError as error:
            raise UserError(f"checkpoint '{settings.model_path[0]}': {error}") from error

    def training() -> Split:
        """The images that int8 is measured on."""
        return open_split(config.dataset, settings.data_dir, train=True, device=computing.device, spec=spec)

    base = base_from_checkpoints(networks, config, split, computing, training)
    return evaluation_of(base, split, settings, computing)


def evaluation_of(
    base: BaseClassifier, split: Split, settings: ClassifierSettings, computing: ComputeSettings
) -> Evaluation:
    """The smoothed classifier over `base`. Raises UserError if the settings ask for heads that are not there."""
    heads = base.config.heads.total
    if settings.head is not None and settings.head >= heads:
        raise UserError(f"--head {settings.head}: the classifier's heads are 0..{heads - 1}")
    if settings.consensus is not None:
        members = base.network.members if isinstance(base.network, HasMembers) else heads
        _check_consensus(settings.consensus, settings.head, members)
    sigma, levels = base.config.noise_sd, split.spec.levels
    noise = GridNoise(sigma, levels) if settings.exact_noise else GaussianNoise(sigma)
    config = replace(
        base.config,
        data_sha256=split.fingerprint(),
        head=settings.head,
        seed=settings.seed,
        compile=settings.compile,
        exact_noise=settings.exact_noise,
        precision=computing.precision,
        noise_slack=noise.slack(split[0][0].numel(), computing.draws),
        arithmetic=arithmetic(),
        versions=deciding_versions(package_versions()),
        consensus=settings.consensus,
    )
    run = base.run_name + ("" if settings.head is None else f"-head-{settings.head}")
    run += "" if settings.consensus is None else f"-consensus-{settings.consensus}"
    smooth = Smooth(base.network, split.spec.num_classes, sigma, noise, settings.consensus)
    return Evaluation(smooth, split, computing.device, computing.batch_size(split), run, config, base.training)


def _check_consensus(first: int, head: int | None, members: int) -> None:
    if head is not None:
        raise UserError("--head and --consensus exclude each other: give one of them")
    if members < 3:
        raise UserError(
            f"--consensus needs at least 3 heads, or networks of an ensemble: this classifier has {members}"
        )
    if not 2 <= first < members:
        raise UserError(f"--consensus {first}: it must lie in 2..{members - 1}, of {members} that vote")


def compute_settings(settings: ClassifierSettings, draws: int) -> ComputeSettings:
    """The device and the arithmetic that the settings name, for so many draws an image.

    Raises UserError for what is not there.
    """
    device = select_device(settings.device, settings.compile)
    precision = select_precision(settings.precision, device)
    if precision == "int8":
        check_exact()
        if settings.compile:
            raise UserError("--compile has nothing to do for --precision int8: leave it out")
    return ComputeSettings(device, precision, settings.batch_size, settings.compile, draws, arithmetic())


def _test_split(dataset: str, settings: ClassifierSettings, computing: ComputeSettings, spec: DataSpec | None) -> Split:
    return main_process_first(
        lambda: open_split(dataset, settings.data_dir, train=False, device=computing.device, spec=spec)
    )


def _from_function(
    name: str, settings: ClassifierSettings, computing: ComputeSettings, split: Split | None
) -> tuple[BaseClassifier, Split]:
    """What --classifier names, and its images: the test split where none is given."""
    if settings.dataset is None:
        raise UserError(f"--classifier does not say its dataset: give --dataset, one of {', '.join(DATASETS)}")
    if settings.noise_sd is None:
        raise UserError("--classifier does not say its noise_sd: give --noise_sd, sigma, in units of [0, 1]")
    for flag, default in (("arch", None), ("num_heads", None), ("normalize", "auto")):
        if getattr(settings, flag) != default:
            raise UserError(f"--{flag} is about a checkpoint's network: a --classifier is what its function returns")
    arguments = foreign.parse_arguments(settings.classifier_args)
    path, function_name = foreign.file_and_function(name)
    function = foreign.build(name, arguments)
    config = RunConfig(
        dataset=settings.dataset,
        arch=printable_name(path.stem),
        noise_sd=settings.noise_sd,
        classifier=f"{path.name}:{function_name}",
        classifier_args=arguments,
        classifier_files={name: sha256(file) for name, file in foreign.files_in(arguments).items()} or None,
        classifier_sha256=sha256(path),
    )
    if split is None:
        split = _test_split(settings.dataset, settings, computing, None)
    run = foreign.run_name(function_name, arguments)
    return base_from_callable(function, split, run, config, computing), split
