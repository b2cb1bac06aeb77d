"""Published checkpoints, certified as the one-head networks that they are."""

import json

import pytest
import torch
from conftest import DIGITS, RUN_FLAGS, beside, without_time


@pytest.fixture
def published(digits_models, tmp_path):
    """The one-head network as a published file holds it."""
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
    assert code == 0 and "--normalize auto takes mean_std: bn1's inputs lie" in err
    code, _, err = script("certify_mhead.py", *flags, "--normalize", "mean_std")
    assert code == 0 and "auto" not in err
    (log,) = tmp_path.rglob("noise_0.5-certify-skip-30.log")
    assert without_time(log) == without_time(ours)
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["normalize"] == ["mean_std"] and config["arch"] == "R8"
    assert "normalize" not in json.loads(beside(ours, ".json").read_text())["config"]
    code, _, err = script("certify_mhead.py", *flags, "--normalize", "none")
    assert code == 2 and "--normalize none contradicts the checkpoint: bn1's inputs then lie" in err
    assert "with mean_std" in err and err.count("\n") == 1


def test_it_stands_in_an_ensemble_with_ours(script, published, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], published, *DIGITS, "--skip", 60, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    assert code == 0, err
    (log,) = tmp_path.rglob("*+noise_0.5-certify-skip-60.log")
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["num_heads"] == [3, 1] and config["normalize"] == ["mean_std", "mean_std"]


def test_it_may_be_certified_at_another_sigma(script, published, tmp_path):
    flags = ("--model_path", published, "--dataset", "digits", "--noise_sd", 1.0, "--skip", 60, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    assert code == 0 and "it was trained with noise 0.5, and is evaluated with 1" in err


def test_constants_are_a_normalisation(script, published, tmp_path):
    """Those of the data set are the same run; other forms of a number are, too."""
    flags = ("--model_path", published, *DIGITS, "--skip", 60, *RUN_FLAGS)
    assert script("certify_mhead.py", *flags, "--normalize", "mean_std")[0] == 0
    code, _, err = script("certify_mhead.py", *flags, "--normalize", ".3054/.3761")
    assert code == 0, err
    code, _, err = script("certify_mhead.py", *flags, "--normalize", "0.3/x")
    assert code == 2 and "unknown normalisation '0.3/x': choose from auto, mean_std, centre, none or constants" in err


def test_a_network_at_chance_gets_a_remark(script, published, tmp_path):
    contents = torch.load(published, weights_only=True)
    contents["state_dict"]["1.fc.weight"] = contents["state_dict"]["1.fc.weight"].roll(1, 0)  # classes in another order
    contents["state_dict"]["1.fc.bias"] = contents["state_dict"]["1.fc.bias"].roll(1, 0)
    torch.save(contents, published)
    flags = ("--model_path", published, *DIGITS, "--skip", 60, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    assert code == 0 and "of 256 noised images, as guessing would be: is it trained for this noise" in err
