"""Every wrong flag, file or folder: one line on stderr, exit code 2, nothing written."""

import re
import sys

import pytest
import torch
from children import run
from conftest import CODES, TINY, full_disk

from spacte.model import checkpoint_file
from spacte.utils import UserError

TRAIN = [
    (["--dataset", "cifar"], "unknown data set 'cifar': choose from digits, CIFAR10, CIFAR100, SVHN"),
    (["--arch", "R7"], "unknown architecture 'R7': choose from R8"),
    (["--arch", "R18"], "R18 needs images of at least 32x32"),
    (["--device", "tpu"], "unknown device 'tpu': choose from auto, cpu, cuda"),
    (["--noise_sd", "0"], "argument --noise_sd: '0' must be above 0 and below 64, in units of [0, 1]"),
    (["--noise_sd", "-0.5"], "must be above 0"),
    (["--noise_sd", "nan"], "must be above 0"),
    (["--batch_size", "0"], "argument --batch_size: '0' must be an integer of at least 1"),
    (["--num_heads", "0"], "--num_heads: '0' must be"),
    (["--num_noise_vec", "0"], "--num_noise_vec: '0' must be"),
    (["--num_noise_vec", "2.5"], "'2.5' must be an integer"),
    (["--epochs", "0"], "--epochs: '0' must be"),
    (
        ["--batch_size", "3", "--num_noise_vec", "4"],
        "--batch_size 3 of 1437 training images: both must be at least 4, for 4 mini-batches",
    ),
    (["--eps", "1.5"], "--eps: '1.5' must be a number from 0 to 1"),
    (["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
    (["--heads", "3"], "unrecognized arguments: --heads 3 (did you mean --num_heads? See --help)"),
    (["--q", "3"], "unrecognized arguments: --q 3 (see --help)"),
    (["--dataset", "ImageFolder", "--data_dir", "nowhere"], "no images in 'nowhere/train'"),
    (["--save_dir", "/dev/null/save"], "cannot write to '/dev/null/save"),
    (["--save_dir", "x", "--runs_dir", "./x"], "--save_dir and --runs_dir are both 'x': give two folders"),
]


def flags_only(value):
    return " ".join(value) if isinstance(value, list) else ""


def is_one_line(code, err, message):
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err and "Traceback" not in err


def written(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("flags", "message"), TRAIN, ids=flags_only)
def test_train(script, tmp_path, flags, message):
    code, _, err = script("0Gaussian/train.py", *TINY, "--epochs", 1, *flags)
    is_one_line(code, err, message)
    assert not written(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(script):
    code, _, err = script("0Gaussian/train.py", *TINY, "--device", "cuda")
    is_one_line(code, err, "there is no device 'cuda' here: 0 CUDA devices are visible")


def test_smoothmix_steps(script, tmp_path):
    code, _, err = script("2SmoothMix/train.py", *TINY, "--num_steps", 2, "--mix_step", 2)
    is_one_line(code, err, "mix_step is 2: it must lie in 0..1")
    assert not written(tmp_path)


CERTIFY = [
    (["--alpha", "0"], "--alpha: '0' must be above 0 and below 1"),
    (["--alpha", "1"], "must be above 0 and below 1"),
    (["--N", "0"], "--N: '0' must be"),
    (["--N0", "0"], "--N0: '0' must be"),
    (["--batch_size", "-1"], "--batch_size: '-1' must be"),
    (["--skip", "0"], "--skip: '0' must be"),
    (["--N", "9"], "--N 9 at --alpha 0.001 can never certify"),
    (["--arch", "R20"], "--arch R20 contradicts checkpoint"),
    (["--num_heads", "5"], "which has num_heads 2"),
    (["--dataset", "MNIST"], "which has dataset digits"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--logs_dir", "/dev/null/logs"], "cannot write to '/dev/null/logs"),
]


@pytest.mark.parametrize(("flags", "message"), CERTIFY, ids=flags_only)
def test_certify(script, trained, tmp_path, flags, message):
    before = written(tmp_path)
    code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", trained, "--device", "cpu", *flags)
    is_one_line(code, err, message)
    assert written(tmp_path) == before


def damaged(kind, path):
    """A checkpoint with one thing wrong."""
    contents = torch.load(path, weights_only=True)
    broken = path.with_name("broken.pth")
    state = contents["state_dict"]
    if kind == "truncated":
        broken.write_bytes(path.read_bytes()[:5000])
        return broken
    if kind == "no state_dict":
        contents = {"weights": state}
    elif kind == "not a dict":
        contents = [1, 2]
    elif kind == "another net":
        contents["state_dict"] = {key.replace("layer1", "stage1"): value for key, value in state.items()}
    elif kind == "classes":
        for head in range(2):
            state[f"1.heads.{head}.1.weight"], state[f"1.heads.{head}.1.bias"] = torch.zeros(7, 64), torch.zeros(7)
    elif kind == "channels":
        state["1.conv1.weight"] = torch.zeros(16, 3, 3, 3)
    elif kind == "not finite":
        state["1.conv1.weight"][0] = float("nan")
    elif kind == "args":
        contents["args"] = [1]
    elif kind == "shape":
        contents["data"]["shape"] = (8, 8)
    elif kind == "bare":
        contents = {"state_dict": state}
    elif kind == "outside":
        contents["args"]["dataset"] = contents["data"]["name"] = "../../outside"
    torch.save(contents, broken)
    return broken


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "is not a readable checkpoint (truncated or foreign)"),
        ("no state_dict", "is a foreign file: a checkpoint holds a 'state_dict'"),
        ("not a dict", "is a foreign file"),
        ("another net", "lacks '1.layer1.0.conv1.weight'"),
        ("classes", "wrong classes: it knows 7, the data have 10; is --dataset right?"),
        ("channels", "(16, 3, 3, 3) in it, not (16, 1, 3, 3)"),
        ("not finite", "values that are not finite in '1.conv1.weight'"),
        ("args", "'args' are not the settings of a run"),
        ("shape", "'data' does not describe a data set"),
        ("bare", "does not say its arch: give --arch"),
        ("outside", "is of data set '../../outside', but its data are '../../outside'"),
    ],
)
def test_checkpoints(script, trained, kind, message):
    code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", damaged(kind, trained), "--device", "cpu")
    is_one_line(code, err, message)


def test_the_name_of_a_run_is_no_path(script, trained, tmp_path):
    contents = torch.load(trained, weights_only=True)
    contents["run"] = "../../../../outside/" + "x" * 300
    torch.save(contents, tmp_path / "strange.pth")
    flags = ("--N0", 10, "--N", 20, "--alpha", 0.1, "--skip", 200, "--device", "cpu")
    code, _, err = script(
        "0Gaussian/certify_mhead.py", "--model_path", "strange.pth", "--logs_dir", "here/logs", *flags
    )
    (log,) = (tmp_path / "here/logs/digits/R8/noise-0.50/certify-mhead").glob("*-certify-skip-200.log")
    assert code == 0 and re.match(r"_.._.._.._outside_x+-[0-9a-f]{12}-certify", log.name), err
    assert not list(tmp_path.glob("outside*"))


def test_a_full_disk_leaves_the_old_checkpoint(trained, tmp_path):
    contents = checkpoint_file.read(trained)
    checkpoint_file.save(tmp_path / "x.pth", contents)
    before = (tmp_path / "x.pth").read_bytes()
    with full_disk(), pytest.raises(UserError, match=r"cannot write '.*/x.pth': File too large"):
        checkpoint_file.save(tmp_path / "x.pth", contents)
    assert (tmp_path / "x.pth").read_bytes() == before and len(list(tmp_path.glob(".*tmp"))) == 0


@pytest.mark.parametrize(
    "command",
    [
        ("report.py", f"{'x' * 300}.log"),
        ("relog.py", f"{'x' * 300}.log"),
        ("relog.py", ""),
        ("merge_logs.py", f"{'x' * 300}-shard-1-of-1.log"),
        ("release.py", "x" * 300, "--output", "y.pth"),
        ("0Gaussian/certify_mhead.py", "--model_path", "x" * 300),
        ("0Gaussian/train.py", *TINY, "--logs_dir", "x" * 300),
        ("experiments.py", "x" * 300, "--work", "work"),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(script, command):
    code, _, err = script(*command)
    is_one_line(code, err, "")


def test_missing_files(script, tmp_path):
    is_one_line(*script("0Gaussian/certify_mhead.py", "--model_path", "no.pth")[::2], "there is no checkpoint 'no.pth'")
    is_one_line(*script("report.py", "no.log")[::2], "'no.log' is not a certification log")
    is_one_line(
        *script("0Gaussian/certify_mhead.py")[::2], "one of the arguments --model_path --classifier is required"
    )


def test_as_a_user_from_a_shell(tmp_path):
    """The same through real processes: a wrong flag, and --help."""
    ended = run([sys.executable, CODES / "0Gaussian/train.py", "--device", "x"], cwd=tmp_path)
    is_one_line(ended.returncode, ended.stderr, "unknown device 'x'")
    helped = run([sys.executable, CODES / "0Gaussian/certify_mhead.py", "--help"], cwd=tmp_path)
    assert helped.returncode == 0 and "--noise_sd" in helped.stdout
