"""Classifiers that are functions of the user's: certified, continued, predicted with and attacked like a checkpoint."""

import json
import os
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import DIGITS, RUN_FLAGS, beside, without_time
from PIL import Image

from spacte.logs.certlog import read_log
from spacte.logs.counts import read_counts
from spacte.model import foreign


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
    models.write_text(models.read_text().replace("torch.manual_seed(0)", change))
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
