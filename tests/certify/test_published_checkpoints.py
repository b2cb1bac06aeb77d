"""The field's published checkpoints, certified as the one-head networks that they are."""

import json

import pytest
import torch
from conftest import DIGITS, RUN_FLAGS, beside, without_time


@pytest.fixture
def published(digits_models, tmp_path):
    """The one-head network as the field would have saved it."""
    state = torch.load(digits_models[1], weights_only=True)["state_dict"]
    state = {key.replace("heads.0.0", "layer3").replace("heads.0.1", "fc"): value for key, value in state.items()}
    path = tmp_path / "noise_0.5" / "checkpoint.pth.tar"
    path.parent.mkdir()
    torch.save({"epoch": 4, "arch": "cifar_resnet8", "state_dict": state, "optimizer": {}}, path)
    return path


def test_a_published_checkpoint_votes_like_the_network_that_it_is(script, published, digits_models, tmp_path):
    """auto finds mean_std, says so, and is the same run as --normalize mean_std; other layers make other runs."""
    code, _, err = script("certify_mhead.py", "--model_path", digits_models[1], "--skip", 30, *RUN_FLAGS)
    (ours,) = tmp_path.rglob("h-1-*-skip-30.log")
    flags = ("--model_path", published, *DIGITS, "--skip", 30, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags, "--max", 100)
    assert code == 0 and "--normalize auto takes mean_std: bn1's statistics lie" in err
    code, _, err = script("certify_mhead.py", *flags, "--normalize", "mean_std")
    assert code == 0 and "auto" not in err
    (log,) = tmp_path.rglob("noise_0.5-certify-skip-30.log")
    assert without_time(log) == without_time(ours)
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["normalize"] == ["mean_std"] and config["arch"] == "R8"
    assert "normalize" not in json.loads(beside(ours, ".json").read_text())["config"]
    code, _, err = script("certify_mhead.py", *flags, "--normalize", "none")
    assert code == 2 and "normalize (['mean_std'] there, ['none'] here)" in err


def test_it_stands_in_an_ensemble_with_ours(script, published, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], published, *DIGITS, "--skip", 60, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    assert code == 0, err
    (log,) = tmp_path.rglob("*+noise_0.5-certify-skip-60.log")
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["num_heads"] == [3, 1] and config["normalize"] == ["mean_std", "mean_std"]


def test_noise_of_another_training_is_no_ground_to_guess_on(script, published, tmp_path):
    flags = ("--model_path", published, "--dataset", "digits", "--noise_sd", 2.0, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    assert code == 2 and err.count("\n") == 1 and "cannot tell: bn1's statistics lie" in err
    assert "give --normalize mean_std, centre or none" in err and not (tmp_path / "logs").exists()
