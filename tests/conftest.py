"""What the tests share: one thread, the defences' modules by name, scripts run in this process."""

import contextlib
import importlib.util
import json
import os
import resource
import runpy
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

from spacte.data.sources import open_split
from spacte.logs import certlog
from spacte.train import command

torch.set_num_threads(1)
pytest_plugins = ["stand_ins"]

ROOT = Path(__file__).parent.parent
CODES = ROOT / "codes"
DEFENCES = tuple(sorted(path.parent.name for path in CODES.glob("*/train.py")))
OWN_MODULES = {path.stem for path in CODES.glob("[0-9]*/*.py") if not path.is_symlink()}  # each folder has its own


def load_module(defence: str, name: str):
    """codes/<defence>/<name>.py under a name of its own, for the defences' modules share theirs. It imports its own."""
    forget_own_modules()
    spec = importlib.util.spec_from_file_location(f"{name}_{defence}", CODES / defence / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(CODES / defence))
    spec.loader.exec_module(module)
    sys.path.remove(str(CODES / defence))
    return module


def load_file(file: str, copy: Path):
    """codes/<file> copied to another place and loaded from there."""
    spec = importlib.util.spec_from_file_location(copy.stem, shutil.copy(CODES / file, copy))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget_own_modules() -> None:
    """The next import of a defence's module looks for its file again."""
    for name in OWN_MODULES:
        sys.modules.pop(name, None)


@contextlib.contextmanager
def full_disk(limit=1000):
    """A limit on a file's size, which fails a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def golden(name: str) -> dict:
    """Numbers recorded from the authors' code."""
    return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())


class AffineHeads(torch.nn.Module):
    """The golden files' classifier: affine heads on tanh(pixels)."""

    def __init__(self, case):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor(case["weights"]))  # [L, K, pixels]
        self.biases = torch.nn.Parameter(torch.tensor(case["biases"]))  # [L, K]

    def forward(self, images):
        return torch.einsum("np,hkp->hnk", images.flatten(1).tanh(), self.weights) + self.biases.unsqueeze(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same draws in every run of a test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Run a script from a scratch folder: script("0Gaussian/train.py", "--epochs", 1) -> exit code, stdout, stderr."""

    def run(path: str, *flags):
        monkeypatch.chdir(tmp_path)
        file = CODES / path
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, flags)])
        monkeypatch.syspath_prepend(str(file.parent))
        forget_own_modules()
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


TINY = ("--dataset", "digits", "--arch", "R8", "--noise_sd", 0.5, "--batch_size", 256, "--device", "cpu")
SMALL = (*TINY, "--train_images", 200, "--num_noise_vec", 2)


@pytest.fixture
def split():
    """The training images of SMALL."""
    digits = open_split("digits", "", True, torch.device("cpu"))
    digits.keep_first_of_each_class(200)
    return digits


def train(folder, *flags):
    """Train 0Gaussian on TINY in a folder, outside the tests' own."""
    gaussian = load_module("0Gaussian", "train").Gaussian
    with contextlib.chdir(folder):
        command.train(gaussian, *command.parse(gaussian, "", [str(flag) for flag in (*TINY, *flags)]))


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder, "--num_heads", 2, "--epochs", 1)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """A two-head network after one epoch on digits, and all that its training leaves: the path of its checkpoint."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "save/digits/R8/noise-0.50/h-2-eps-0.8-m-2-lbdlast-1.2/epoch1.pth"


DIGITS = ("--dataset", "digits", "--noise_sd", 0.5)  # what a classifier that is not ours does not say
RUN_FLAGS = ("--N0", 20, "--N", 200, "--device", "cpu", "--batch_size", 100)


def attack_flags(model, log, *more):
    return (
        "--model_path",
        model,
        "--log",
        log,
        "--N",
        200,
        "--num_steps",
        8,
        "--num_noise_vec",
        8,
        "--device",
        "cpu",
        *more,
    )


@pytest.fixture(scope="session")
def digits_models(tmp_path_factory):
    """Two trained networks, of 3 heads and of 1, 4 epochs on digits: the paths of their checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for heads, run in ((3, "h-3-eps-0.8-m-2-lbdlast-1.2"), (1, "h-1-m-2")):
        train(folder, "--num_heads", heads, "--epochs", 4, "--lr_step_size", 3, "--batch_size", 128)
        paths.append(folder / f"save/digits/R8/noise-0.50/{run}/epoch4.pth")
    return paths


@pytest.fixture
def own_flags(digits_models):
    """What a defence needs to train for a few epochs on TINY: own_flags(defence) -> flags."""
    flags = {
        "3SmoothAdv": ("--num_steps", 2, "--epsilon", 0.25),
        "4MACER": ("--num_noise_vec", 4),
        "5CATRS": ("--num_steps", 1, "--num_votes", 100, "--pretrained_model", digits_models[1]),
        "6ACRWeakness": ("--ds_epoch", 1, "--ds_threshold", 0.05, "--attack_steps", 1, "--dataset_weight_epoch", 2),
    }
    return lambda defence: flags.get(defence, ())


@pytest.fixture
def certify(script, digits_models, tmp_path):
    """Certify with the 3-head network, or `models`: the log's path; the run must succeed."""

    def run(logs, *flags, skip=30, models=digits_models[:1]):
        command = ("--model_path", *models, "--logs_dir", logs, "--skip", skip, *RUN_FLAGS, *flags)
        code, _, err = script("0Gaussian/certify_mhead.py", *command)
        assert code == 0, err
        (log,) = [path for path in (tmp_path / logs).rglob("*.log") if "ACR" not in path.name]
        return log

    return run


def beside(log, ending):
    return log.with_name(log.name.removesuffix(".log") + ending)


def without_time(log):
    return [line.rsplit("\t", 1)[0] for line in log.read_text().splitlines()]


EXCERPTS = Path(__file__).parent / "golden" / "logs"  # 25 images of three of the authors' logs


def make_log(path: Path, rows, header=certlog.HEADER) -> Path:
    """A log of (idx, label, predict, radius)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "".join(certlog.format_row(*row, 1.0) for row in rows))
    return path


def random_log(path: Path, images: int, seed: int, shift=0.0) -> Path:
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(0, 4, images)  # the same images in every log
    predict = np.where(rng.random(images) < 0.8, labels, (labels + 1) % 4)
    predict = np.where(rng.random(images) < 0.1, -1, predict)
    radius = np.where(predict < 0, 0, rng.uniform(0, 1, images) + shift)
    return make_log(path, zip(range(images), labels.tolist(), predict.tolist(), radius.tolist(), strict=True))


CONFIG = {
    "kind": "certify", "dataset": "digits", "arch": "R8", "num_heads": [5], "noise_sd": 0.5, "head": None, "N0": 100,
    "N": 1000, "alpha": 0.001, "sequential": None, "skip_wrong": False, "exact_noise": False, "precision": "fp32",
}  # fmt: skip


def with_config(log, training=(), **fields):
    """The log, with a configuration beside it, and what the classifier's checkpoints were trained with."""
    about = {"training": [*training]}
    log.with_suffix(".json").write_text(json.dumps({"config": CONFIG | fields, "about": about}))
    return log


# of certify_dataset
SETTINGS = {"N0": 20, "N": 200, "skip": 30, "device": "cpu", "batch_size": 100}


@pytest.fixture
def digits():
    """The test images of digits, and their labels."""
    split = open_split("digits", ".", False, torch.device("cpu"))
    return next(split.batches(len(split)))


@pytest.fixture
def models(tmp_path):
    """A user's my_models.py in the folder where the scripts run: its path."""
    return Path(shutil.copy(Path(__file__).parent / "my_models.py", tmp_path))


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
