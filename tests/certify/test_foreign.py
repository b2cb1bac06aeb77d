"""Classifiers that are functions of the user's, which must keep a contract."""

import json
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DIGITS, RUN_FLAGS, beside, without_time
from PIL import Image

from spacte.logs.certlog import read_log
from spacte.logs.counts import read_counts
from spacte.model import foreign
from spacte.precision import select_precision

MODELS = """
import torch
from torch import nn
from torch import relu as builtin

def net(width=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width))

def build(scale=1.0, name="x"):
    network = net()
    network[1].weight.data *= scale
    return network

def three():
    network = net(30)
    return lambda images: network(images).view(-1, 3, 10).transpose(0, 1)

def no_gradient():
    network = net()
    return lambda images: network(images.detach())

def random():
    network = net()
    return lambda images: nn.functional.dropout(network(images), 0.3)

def train_mode():
    network = nn.Sequential(nn.BatchNorm2d(1), net()).train()
    return lambda images: network(images)

def company():
    network = net()
    return lambda images: network(images - images.mean())

def probabilities():
    logits = three()
    return lambda images: logits(images).softmax(-1)

def classes():
    network = net()
    return lambda images: network(images).argmax(-1)

def no_tensor():
    network = net()
    return lambda images: {"logits": network(images)}

def not_finite():
    network = net()
    return lambda images: network(images).log()

def too_few():
    return net(7)

def other_images():
    return nn.Linear(3, 10)

def one_image():
    network = net()
    return lambda images: network(images)[:1]

def nothing():
    pass

def ends():
    raise SystemExit(2)

def settings(old="", new="", benchmark=False):
    network = net()
    def classifier(images):
        if old:
            torch.set_float32_matmul_precision(old)
        if new:
            name, value = new.split()
            getattr(torch.backends, name).conv.fp32_precision = value
        torch.backends.cudnn.benchmark = benchmark
        return network(images)
    return classifier

def general():
    torch.backends.fp32_precision = "tf32"
    return net()

def old_name():
    torch.backends.cuda.matmul.allow_tf32 = True
    return net()

def new_name():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    return net()

def missing():
    return torch.load("weights.pth")
"""


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "my_models.py"
    path.write_text(MODELS)
    return path


@pytest.fixture
def certify(script, models, tmp_path):
    """Certify a function of my_models.py: the log's path; the run must succeed."""

    def run(logs, function, *flags):
        command = ("--classifier", f"my_models.py:{function}", *DIGITS, "--logs_dir", logs, "--skip", 30, *RUN_FLAGS)
        code, _, err = script("certify_mhead.py", *command, *flags)
        assert code == 0, err
        (log,) = [path for path in (tmp_path / logs).rglob("*.log") if "ACR" not in path.name]
        return log

    return run


# --- functions ---


def test_a_function_is_certified_as_a_checkpoint_is(certify, script, tmp_path):
    """It goes on after an interruption; its shards merge to the same log; the configuration says who it is."""
    log = certify("a", "build", "--classifier_args", "scale=3.0", "name=b c", "--max", 100)
    assert str(log.relative_to(tmp_path)) == (
        "a/digits/my_models/noise-0.50/certify-mhead/build-scale-3.0-name-b_c-certify-skip-30.log"
    )
    begun = log.read_text()
    certify("a", "build", "--classifier_args", "scale=3.0", "name=b c")
    assert log.read_text().startswith(begun) and len(read_log(log)) == 12
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["classifier"] == "my_models.py:build" and config["num_heads"] == [1]
    assert config["classifier_args"] == {"scale": 3.0, "name": "b c"}
    assert len(config["classifier_sha256"]) == 64 and len(config["parameters_sha256"]) == 64
    flags = ("--classifier", "my_models.py:build", "--classifier_args", "scale=3.0", "name=b c", *DIGITS, "--skip", 30)
    for shard in ("1/2", "2/2"):
        assert script("certify_mhead.py", *flags, *RUN_FLAGS, "--logs_dir", "b", "--shard", shard)[0] == 0
    shards = sorted((tmp_path / "b").rglob("*-of-2.log"))
    code, _, err = script("merge_logs.py", *shards)
    assert code == 0, err
    assert without_time(shards[0].with_name(log.name)) == without_time(log)
    code, out, _ = script("report.py", log)
    assert code == 0 and "my_models" in out


def test_a_file_that_an_argument_names_may_lie_elsewhere_but_not_be_another(certify, script, tmp_path):
    """By its hash; an older run, which holds its path alone, resumes under that path."""
    (tmp_path / "weights.pth").write_text("weights")
    log = certify("a", "build", "--classifier_args", "name=weights.pth", "--max", 100)
    moved = tmp_path / "elsewhere" / "weights.pth"
    moved.parent.mkdir()
    moved.write_text("weights")
    certify("a", "build", "--classifier_args", f"name={moved}", "--max", 200)
    assert len(read_log(log)) == 7
    flags = ("--classifier", "my_models.py:build", *DIGITS, "--logs_dir", "a", "--skip", 30, *RUN_FLAGS)
    (tmp_path / "weights.pth").write_text("others")
    code, _, err = script("certify_mhead.py", *flags, "--classifier_args", "name=weights.pth")
    assert code == 2 and "another configuration: classifier_args (" in err
    (tmp_path / "weights.pth").write_text("weights")
    content = json.loads(beside(log, ".json").read_text())
    del content["config"]["classifier_files"]
    beside(log, ".json").write_text(json.dumps(content))
    code, _, err = script("certify_mhead.py", *flags, "--classifier_args", "name=weights.pth")
    assert code == 2 and "another configuration: classifier_args (" in err
    assert script("certify_mhead.py", *flags, "--classifier_args", f"name={moved}")[0] == 0


def test_several_heads_vote_alone_and_together(certify):
    log = certify("a", "three", "--sequential", "--certificate", "all-votes")
    assert read_counts(beside(log, "-counts.jsonl"))[0].estimation.shape == (4, 10)
    assert json.loads(beside(log, ".json").read_text())["config"]["num_heads"] == [3]
    assert "three-head-2-" in certify("b", "three", "--head", 2).name


def test_a_file_runs_as_it_is_now(tmp_path, monkeypatch):
    """Also where kept bytecode looks current: of a file of as many bytes, written in the same second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "mine.py"
    for number in (1, 2):
        path.write_text(f"def build():\n    return lambda images: {number}\n")
        os.utime(path, (0, 0))
        assert foreign.build(f"{path}:build", {})(None) == number
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("change", "field"), [("torch.manual_seed(1)", "parameters_sha256"), ("torch.manual_seed(0) ", "classifier_sha256")]
)
def test_a_run_goes_on_with_the_same_classifier_only(certify, script, models, change, field):
    log = certify("a", "build", "--max", 100)
    before = log.read_text()
    models.write_text(MODELS.replace("torch.manual_seed(0)", change))
    flags = ("--classifier", "my_models.py:build", *DIGITS, "--logs_dir", "a", "--skip", 30, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    assert code == 2 and "another configuration: " in err and f"{field} (" in err
    assert log.read_text() == before


def test_prediction_and_attack(certify, script, tmp_path):
    flags = ("--classifier", "my_models.py:build", *DIGITS, "--N", 200, "--device", "cpu")
    assert script("predict_mhead.py", *flags, "--skip", 60)[0] == 0
    log = certify("a", "build", "--max", 60)
    code, _, err = script("attack_mhead.py", *flags, "--log", log, "--radii", 0.5, "--num_steps", 2)
    assert code == 0, err
    (path,) = tmp_path.rglob("*-attack.log")
    assert len(pd.read_csv(path, sep="\t")) == 2
    log = certify("b", "no_gradient", "--max", 60)
    flags = ("--classifier", "my_models.py:no_gradient", *flags[2:], "--logs_dir", "c")
    code, _, err = script("attack_mhead.py", *flags, "--log", log, "--radii", 0.5)
    assert code == 2 and err.count("\n") == 1 and "no gradient of the classifier's logits reaches the images" in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("random", "gives two different answers for the same images: switch off what is random in it"),
        ("train_mode", "depends on the other images of its batch: take BatchNorm out of train mode"),
        ("company", "depends on the other images of its batch"),
        ("probabilities", "the 3 heads return probabilities, and what is summed over heads is logits"),
        ("classes", "returned int64 [100]: it must return logits, floating point, [N, K] or [L, N, K]"),
        ("no_tensor", "returned a dict: it must return logits"),
        ("not_finite", "logits are not finite on noised images"),
        ("too_few", "the classifier knows 7 classes, the data have 10"),
        ("other_images", "fails on images [100, 1, 8, 8]: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("one_image", "returned float32 [1, 10] for 100 images"),
        ("nothing", "nothing returned a NoneType: it must return a module or a callable"),
        ("missing", "FileNotFoundError: [Errno 2] No such file or directory: 'weights.pth' (my_models.py, line"),
        ("ends", "--classifier my_models.py:ends: SystemExit: 2 (my_models.py, line"),
        ("other", "'my_models.py' has no function 'other'; it has net, build, three"),
        ("builtin", "--classifier my_models.py:builtin: 'builtin' is not a Python function"),
    ],
)
def test_the_contract_is_checked_before_anything_is_written(script, models, tmp_path, function, message):
    flags = ("--classifier", f"my_models.py:{function}", *DIGITS, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    errors = [line for line in err.splitlines() if "warning: no parameters" not in line]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def as_it_was():
    """torch's settings, which are the whole process'."""
    before = torch.backends.cudnn.allow_tf32
    yield
    select_precision("fp32", torch.device("cpu"))
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before, False


CHANGED = [
    (("old_name",), "float32_matmul_precision", "high", "highest"),
    (("new_name",), "float32_matmul_precision", "tf32 on CUDA, ieee on CPU", "highest"),
    (("general",), "cudnn_allow_tf32", "tf32 in convolutions, tf32 in recurrent layers", "False"),
    (("settings", "old=medium"), "float32_matmul_precision", "medium", "highest"),
    (("settings", "new=cudnn tf32"), "cudnn_allow_tf32", "tf32 in convolutions, none in recurrent layers", "False"),
    (("settings", "new=mkldnn bf16"), "mkldnn_conv_fp32_precision", "bf16", "none"),
    (("settings", "benchmark=True"), "cudnn_benchmark", True, "False"),
]


@pytest.mark.parametrize(("function", "name", "value", "before"), CHANGED, ids=[str(case[0]) for case in CHANGED])
def test_settings_of_the_arithmetic_that_a_classifier_changes_are_warned_of(
    script, models, tmp_path, as_it_was, function, name, value, before
):
    """Also where torch's older settings, at odds with its newer ones, cannot be read; nobody's are left to the next."""
    arguments = ("--classifier_args", *function[1:]) if function[1:] else ()
    flags = (*DIGITS, "--skip", 120, *RUN_FLAGS, *arguments)
    code, _, err = script("certify_mhead.py", "--classifier", f"my_models.py:{function[0]}", *flags)
    (line,) = [line for line in err.splitlines() if "arithmetic" in line]
    start, end = line.split(f"({name} {value}, not {before}")
    assert code == 0 and start == "certify_mhead.py: warning: the classifier sets torch's arithmetic "
    assert end.endswith("): the log's JSON says so under arithmetic, beside its precision fp32")
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["config"]["arithmetic"][name] == value
    code, _, err = script("certify_mhead.py", "--classifier", "my_models.py:build", *flags[: -len(arguments) or None])
    assert code == 0 and "arithmetic" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--classifier", "my_models"), "it must be FILE.py:function"),
        (("--classifier", "no.py:build"), "there is no file 'no.py'"),
        (("--classifier", "broken.py:build"), "SyntaxError: '(' was never closed (broken.py, line 1)"),
        (
            ("--classifier_args", "depth=3"),
            "unexpected keyword argument 'depth'; --classifier_args must fit build(scale",
        ),
        (("--classifier_args", "scale"), "each must be key=value"),
        (("--dataset", "cifar"), "unknown data set 'cifar'"),
        (("--arch", "R8"), "--arch is about a checkpoint's network"),
        (("--normalize", "none"), "--normalize is about a checkpoint's network"),
        (("--head", 1), "the classifier's heads are 0..0"),
        (("--model_path", "a.pth"), "not allowed with argument"),
    ],
)
def test_wrong_flags(script, models, tmp_path, flags, message):
    (tmp_path / "broken.py").write_text("x = (")
    command = ("--classifier", "my_models.py:build", *DIGITS, *RUN_FLAGS, *flags)
    code, _, err = script("certify_mhead.py", *command)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("given", "message"), [(DIGITS[2:], "its dataset: give"), (DIGITS[:2], "its noise_sd: give")])
def test_a_function_does_not_say_data_and_noise(script, models, given, message):
    code, _, err = script("certify_mhead.py", "--classifier", "my_models.py:build", *given, *RUN_FLAGS)
    assert code == 2 and message in err


def test_a_timm_model_on_image_files(script, tmp_path):
    pytest.importorskip("timm", reason="pip install -r tests/requirements.txt")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        folder = tmp_path / "images" / "test" / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "from_timm.py").write_text(
        "import timm, torch\n\n\ndef build(model):\n    torch.manual_seed(0)\n"
        "    network = timm.create_model(model, pretrained=False, num_classes=3)\n"
        "    return torch.nn.Sequential(torch.nn.BatchNorm2d(3), network)\n"
    )
    flags = ("--dataset", "ImageFolder", "--data_dir", "images", "--noise_sd", 0.25, "--N0", 10, "--N", 40)
    model = ("--classifier", "from_timm.py:build", "--classifier_args", "model=resnet10t")
    code, _, err = script("certify_mhead.py", *model, *flags, "--batch_size", 40, "--device", "cpu")
    assert code == 0, err
    (log,) = tmp_path.rglob("build-model-resnet10t-certify-skip-1.log")
    assert read_log(log)["label"].tolist() == [0, 0, 1, 1, 2, 2]
