"""What is certified, how: single heads, ensembles, early stopping, prediction, exact noise, consensus."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import attack_flags, beside, without_time
from scipy import stats

from spacte.logs.certlog import average_certified_radius, read_log
from spacte.logs.counts import AttackCounts, read_counts
from spacte.smooth.bounds import anytime_lower_bound
from spacte.smooth.noise import GridNoise

# --- single heads ---


def test_one_head_alone_from_the_network_or_from_the_counts(certify, script):
    log, alone = certify("a"), certify("b", "--head", 1)
    assert "-head-1-" in alone.name
    assert script("relog.py", log, "--head", 1)[0] == 0
    assert without_time(next(log.parent.glob("*-alpha-0.001-head-1.log"))) == without_time(alone)
    assert without_time(alone) != without_time(log)
    code, _, err = script("relog.py", log)
    assert code == 2 and "is certified so already: give another --alpha" in err
    code, out, _ = script("report.py", log, "--heads")
    assert code == 0 and out.count("| head ") == 3 and f"{average_certified_radius(read_log(alone)):.3f}" in out


def test_a_head_that_is_not_there_is_refused(script, digits_models):
    code, _, err = script(
        "0Gaussian/certify_mhead.py", "--model_path", digits_models[0], "--head", 3, "--device", "cpu"
    )
    assert code == 2 and "--head 3: the classifier's heads are 0..2" in err


# --- several checkpoints ---


def test_an_ensemble_sums_the_logits_of_its_networks(certify, digits_models):
    log = certify("a", "--max", 60, models=[*digits_models, digits_models[1]])
    assert log.name.startswith("h-3-eps-0.8-m-2-lbdlast-1.2+h-1-m-2x2-certify")
    assert read_counts(beside(log, "-counts.jsonl"))[0].estimation.shape == (3 + 1 + 1 + 1, 10)
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["num_heads"] == [3, 1, 1] and len(config["checkpoint_sha256"]) == 3
    twice = certify("b", "--max", 60, models=[digits_models[1]] * 2)
    once = certify("c", "--max", 60, models=[digits_models[1]])
    assert without_time(twice) == without_time(once)  # twice the same logits choose the same class


def test_checkpoints_of_different_sigma_do_not_make_an_ensemble(script, digits_models, tmp_path):
    contents = torch.load(digits_models[1], weights_only=True)
    contents["args"]["noise_sd"] = 0.25
    torch.save(contents, tmp_path / "other.pth")
    code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", digits_models[0], tmp_path / "other.pth")
    assert code == 2 and "the checkpoints' noise_sd differ: 0.25, 0.5" in err


# --- stopping early ---


def test_sequential_runs_draw_less_and_claim_what_their_counts_allow(certify):
    fixed = certify("fixed", "--N", 5000, "--batch_size", 1000)
    log = certify("sequential", "--N", 5000, "--batch_size", 1000, "--sequential")
    votes = read_counts(beside(log, "-counts.jsonl"))
    used = [int(one.estimation[-1].sum()) for one in votes]
    assert max(used) <= 5000 and sum(used) < 5000 * len(used) / 2
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["sequential"]["radii"] == [0, 0.25, 0.5, 0.75, 1.0, 1.25]
    for one, row in zip(votes, read_log(log).itertuples(), strict=True):
        if row.predict >= 0:
            p_lower = anytime_lower_bound(int(one.estimation[-1][row.predict]), int(one.estimation[-1].sum()), 0.001)
            assert row.radius == pytest.approx(0.5 * stats.norm.ppf(p_lower), rel=1e-5)
    both = read_log(fixed).merge(read_log(log), on="idx")
    assert (both["predict_x"] == both["predict_y"]).all()
    certified = [(both[f"correct_{run}"] * both[f"radius_{run}"] >= 0.25).mean() for run in "xy"]
    assert abs(certified[0] - certified[1]) <= 1 / 12 + 1e-9


@pytest.mark.parametrize(("flags", "rule"), [
    (("--radii", 0.25), {"radii": [0.25], "give_up": 0.01}),
    (("--radii", 0.25, "--give_up", 0.2), {"radii": [0.25], "give_up": 0.2}),
    (("--tolerance", 0.2), {"tolerance": 0.2}),
])  # fmt: skip
def test_the_stopping_rule_is_the_users(certify, flags, rule):
    log = certify("a", "--N", 5000, "--sequential", *flags, "--max", 100)
    assert json.loads(beside(log, ".json").read_text())["config"]["sequential"] == rule
    assert any(int(one.estimation[-1].sum()) < 5000 for one in read_counts(beside(log, "-counts.jsonl")))


def test_stopping_rules_need_sequential_and_exclude_each_other(script, digits_models):
    for flags, message in (
        (("--radii", 0.5), "it needs --sequential"),
        (("--sequential", "--radii", 0.5, "--tolerance", 0.1), "--tolerance and --radii belong"),
        (("--sequential", "--tolerance", 0.1, "--give_up", 0.1), "--tolerance and --give_up belong"),
    ):
        code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", digits_models[0], *flags)
        assert code == 2 and message in err


def test_skip_wrong_draws_nothing_for_a_wrong_class(certify, script):
    plain, log = certify("a", "--max", 100, skip=3), certify("b", "--max", 100, "--skip_wrong", skip=3)
    rows, votes = read_log(log), read_counts(beside(log, "-counts.jsonl"))
    skipped = [one.idx for one in votes if int(one.estimation.sum()) == 0]
    assert skipped == [one.idx for one in votes if int(one.selection[-1].argmax()) != one.label] and skipped
    assert (rows[rows["idx"].isin(skipped)][["radius", "correct"]] == 0).all(axis=None)
    assert average_certified_radius(rows) == average_certified_radius(read_log(plain))
    code, _, err = script("report.py", log, "--heads")
    assert code == 2 and "--skip_wrong" in err


# --- prediction, exact noise ---


def test_prediction_logs(script, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], "--skip", 10, "--N", 200, "--device", "cpu")
    code, out, err = script("0Gaussian/predict_mhead.py", *flags)
    assert code == 0, err
    (path,) = (tmp_path / "logs/digits/R8/noise-0.50/predict-mhead").glob("*.log")
    log = pd.read_csv(path, sep="\t")
    assert list(log) == ["idx", "label", "predict", "correct", "time"] and log["idx"].tolist() == list(
        range(0, 360, 10)
    )
    assert log["correct"].mean() > 0.5 and (log[log["predict"] == -1]["correct"] == 0).all()
    assert f"accuracy {log['correct'].mean():.3f}" in out


def test_predictions_resume_and_are_divided_like_certificates(script, digits_models, tmp_path):
    flags = ("--model_path", digits_models[0], "--skip", 60, "--N", 200, "--device", "cpu", "--logs_dir")
    runs = [("whole",), ("cut", "--max", 100), ("cut",), ("shards", "--shard", "1/2"), ("shards", "--shard", "2/2")]
    for one in runs:
        code, _, err = script("predict_mhead.py", *flags, *one)
        assert code == 0, err
    shards = sorted((tmp_path / "shards").rglob("*-shard-*.log"))
    code, _, err = script("merge_logs.py", *shards)
    assert code == 0, err
    (whole,) = (tmp_path / "whole").rglob("*.log")
    assert len(without_time(whole)) == 7
    for other in ("cut", "shards"):
        assert without_time(next((tmp_path / other).rglob(whole.name))) == without_time(whole)


def test_attacked_images_lie_on_the_grid_of_exact_noise(certify, script, digits_models):
    """Off it they are refused by the noise; the way there does not lead out of the ball."""
    log = certify("logs", "--exact_noise", "--max", 100)
    code, out, err = script("attack_mhead.py", *attack_flags(digits_models[0], log, "--radii", 0.5, "--exact_noise"))
    assert code == 0 and "empirical accuracy" in out, err
    (counts,) = Path("logs").rglob("*-attack-counts.jsonl")
    norms = [norm for line in counts.open() for norm in AttackCounts.from_line(line).norms]
    assert len(norms) == 4 and max(norms) <= 0.5 < 1.5 * min(norms)


def test_exact_noise_certifies_like_ordinary_noise(certify):
    """36 images at N 1000: no class's share of an image's votes differs by more than 6 standard errors."""
    plain = certify("plain", "--N", 1000, "--batch_size", 1000, skip=10)
    log = certify("exact", "--N", 1000, "--batch_size", 1000, "--exact_noise", skip=10)
    shares = [
        np.stack([one.estimation / 1000 for one in read_counts(beside(path, "-counts.jsonl"))]) for path in (plain, log)
    ]
    assert np.abs(shares[0] - shares[1]).max() < 6 * (2 * 0.25 / 1000) ** 0.5
    assert average_certified_radius(read_log(log)) > 0.1
    config = json.loads(beside(log, ".json").read_text())["config"]
    assert config["exact_noise"] and 0 < config["noise_slack"] == GridNoise(0.5, 16).slack(64, 1000) < 1e-6
    assert config["arithmetic"]["cudnn_allow_tf32"] is False and config["precision"] == "fp32"


@pytest.mark.parametrize(("flags", "message"), [
    (("--N", 5), "always abstains, even where all votes agree: take at least 11"),
    (("--exact_noise", "--alpha", 1e-15), "--alpha 1e-15 is below what --exact_noise costs at --N 500"),
])  # fmt: skip
def test_an_n_that_never_decides_is_refused(certify, script, digits_models, flags, message):
    log = certify("logs", "--max", 30)
    common = ("--model_path", digits_models[0], "--N", 500, "--device", "cpu")
    if "--exact_noise" not in flags:
        attack = script("0Gaussian/attack_mhead.py", *common, "--log", log, "--radii", 1, *flags)
        assert attack[0] == 2 and message in attack[2]
    else:
        code, _, err = script("0Gaussian/certify_mhead.py", *common, *flags)
        assert code == 2 and message in err
    code, _, err = script("0Gaussian/predict_mhead.py", *common, *flags)
    assert code == 2 and message in err


# --- consensus ---


def test_a_consensus_is_certified_as_the_classifier_that_it_is(certify, script, digits_models, tmp_path):
    """Its log, votes of the first heads, relog, report, predict, attack and ensembles; what is none is refused."""
    log, plain = certify("a", "--consensus", 2), certify("b")
    assert log.name == plain.name.replace("-certify", "-consensus-2-certify")
    mine, all_heads = (read_counts(beside(one, "-counts.jsonl")) for one in (log, plain))
    for few, every in zip(mine, all_heads, strict=True):
        assert few.estimation.shape == (3, 10) and (few.estimation[:2] == every.estimation[:2]).all(), "the same draws"
    assert any((few.estimation[2] != every.estimation[3]).any() for few, every in zip(mine, all_heads, strict=True))
    code, out, err = script("report.py", log, plain, "--heads", "--format", "json")
    assert "used --consensus: only its first 2 heads have rows of their own" in err
    rows = [one["heads"] for one in json.loads(out)["logs"]]
    assert code == 0 and {"3", "3 by consensus of 2", "head 1 of 3"} <= set(rows)
    assert script("relog.py", log, "--certificate", "all-votes", "--head", 1)[0] == 0
    assert "counts' heads are 0..1" in script("relog.py", log, "--head", 2)[2]
    model = ("--model_path", digits_models[0], "--device", "cpu")
    flags = attack_flags(digits_models[0], log, "--radii", 0.3, "--max", 90)
    assert "consensus (2 there, None here)" in script("0Gaussian/attack_mhead.py", *flags)[2]
    assert script("0Gaussian/attack_mhead.py", *flags, "--consensus", 2)[0] == 0
    assert script("0Gaussian/predict_mhead.py", *model, "--consensus", 2, "--N", 100, "--skip", 90)[0] == 0
    three = [digits_models[0], digits_models[1], digits_models[1]]
    networks = certify("c", "--consensus", 2, "--sequential", "--exact_noise", "--alpha", 0.01, models=three)
    assert read_counts(beside(networks, "-counts.jsonl"))[0].estimation.shape == (3, 10)
    code, _, err = script("relog.py", networks, "--head", 1)
    assert code == 2 and "consensus of networks are of networks, not of heads" in err
    code, out, err = script("report.py", networks, "--heads", "--format", "json")
    assert code == 0 and len(json.loads(out)["logs"]) == 1 and "no head is alone in them" in err
    for flags, message in (
        (("--consensus", 3), "--consensus 3: it must lie in 2..2, of 3 that vote"),
        (("--consensus", 2, "--head", 1), "exclude each other"),
        (("--consensus", 2, "--model_path", digits_models[1]), "needs at least 3 heads"),
    ):
        code, _, err = script("0Gaussian/certify_mhead.py", *model, *flags)
        assert code == 2 and message in err and err.count("\n") == 1
