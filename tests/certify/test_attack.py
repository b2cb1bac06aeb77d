"""attack_mhead.py: which certificates hold out, on what images, and its log."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import attack_flags, beside, without_time
from scipy import stats

from spacte.certify import attack
from spacte.data.sources import open_split
from spacte.logs.certlog import read_log
from spacte.model.checkpoint import load_classifier


def test_no_attack_breaks_a_certificate(certify, script, digits_models, tmp_path):
    """An image is wrongly flagged if its certificate is wrong (0.001) or one of two predictions is (0.001 each).

    So at most 0.003 an image; of 36 independent images 5 are flagged with P < 1e-6.
    """
    assert stats.binom.sf(4, 36, 0.003) < 1e-6
    log = certify("logs", "--N", 1000, "--batch_size", 1000, skip=10)
    flags = attack_flags(digits_models[0], log, "--radii", 0.5, 0.2)
    code, out, err = script("0Gaussian/attack_mhead.py", *flags)
    assert code == 0, err
    (path,) = tmp_path.rglob("*-attack.log")
    table, certified = pd.read_csv(path, sep="\t"), read_log(log)
    assert len(table) == 72 and table[table["broken"] == 1]["idx"].nunique() < 5
    empirical = table.groupby("attack_radius")["correct"].mean()
    shares = [(certified["radius"] * certified["correct"] >= radius).mean() for radius in (0.2, 0.5)]
    assert empirical[0.2] > empirical[0.5] and all(empirical >= shares)
    assert empirical[0.5] < certified["correct"].mean()  # the attack does something
    assert "empirical accuracy" in out and "|       36 |" in out


def test_a_claim_that_is_too_large_is_seen_to_break(certify, script, digits_models, tmp_path):
    """A radius of 3 that nobody certified is broken by attacks of norm 2.5; a claim of 1 says nothing of those."""
    log = certify("logs", "--N", 1000, "--batch_size", 1000, skip=30)
    broken = {}
    for claim in (3, 1):
        path = tmp_path / f"claim-{claim}.log"
        pd.read_csv(log, sep="\t").assign(radius=claim).to_csv(path, sep="\t", index=False)
        code, out, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], path, "--radii", 2.5))
        assert code == 0, err
        table = pd.read_csv(next(tmp_path.rglob(f"claim-{claim}-attack.log")), sep="\t")
        broken[claim] = table["broken"].sum()
        assert out.count("is broken at 2.5") == broken[claim]
    assert broken[3] > 2 and broken[1] == 0


def test_an_attack_goes_on_and_is_not_mixed(certify, script, digits_models, tmp_path):
    log = certify("logs", skip=30)
    flags = attack_flags(digits_models[0], log, "--radii", 0.5)
    assert script("0Gaussian/attack_mhead.py", *flags, "--max", 100)[0] == 0
    (path,) = tmp_path.rglob("*-attack.log")
    first = path.read_text()
    code, _, err = script("0Gaussian/attack_mhead.py", *flags, "--radii", 0.25)
    assert code == 2 and "radii ([0.5] there, [0.25] here)" in err and path.read_text() == first
    assert script("0Gaussian/attack_mhead.py", *flags)[0] == 0
    assert path.read_text().startswith(first) and len(pd.read_csv(path, sep="\t")) == 12
    assert script("0Gaussian/attack_mhead.py", *flags, "--radii", 0.25, "--overwrite")[0] == 0
    assert set(pd.read_csv(path, sep="\t")["attack_radius"]) == {0.25}


@pytest.mark.parametrize("flags, message", [
    (("--exact_noise",), "exact_noise (False there, True here)"),
    (("--skip", 7, "--max", 1000, "--head", 0), "head (None there, 0 here)"),
])  # fmt: skip
def test_an_attack_on_another_classifier_is_refused(certify, script, digits_models, flags, message):
    log = certify("logs", skip=30)
    code, _, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], log, "--radii", 1, *flags))
    assert code == 2 and message in err


def test_an_attack_on_a_head_climbs_that_heads_logits(certify, script, digits_models, monkeypatch):
    climbed, through_noise = [], attack.through_noise

    def noted(logits_of, image, *args):
        climbed.append(logits_of(image.unsqueeze(0)).detach())
        return through_noise(logits_of, image, *args)

    monkeypatch.setattr(attack, "through_noise", noted)
    log = certify("logs", "--head", 1, skip=90)
    flags = attack_flags(digits_models[0], log, "--radii", 0.5, "--head", 1)
    code, _, err = script("0Gaussian/attack_mhead.py", *flags)
    assert code == 0, err
    network, split = load_classifier(digits_models[0]).classifier, open_split("digits", "", False)
    expected = [network(split[idx][0].unsqueeze(0))[1:2] for idx in range(0, 360, 90)]
    torch.testing.assert_close(torch.stack(climbed), torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_where_no_image_is_left_an_attack_has_nothing_to_do(certify, script, digits_models):
    log = certify("logs", "--max", 100)
    code, out, err = script(
        "0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], log, "--radii", 1, "--skip", 361)
    )
    assert code == 0 and "|        1 |" in out, err


def test_an_attack_on_other_images_is_refused(script, digits_models, tmp_path):
    log = tmp_path / "other.log"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.5\t1\t0:00:01\n")
    code, _, err = script(
        "0Gaussian/attack_mhead.py", "--model_path", digits_models[0], "--log", log, "--radii", 1, "--device", "cpu"
    )
    assert code == 2 and "its idx 0 has label 3" in err
    code, _, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], tmp_path, "--radii", 1))
    assert code == 2 and "is a folder: give a certification log" in err


def test_a_certificate_on_a_wrong_class_is_attacked_from_that_class(certify, script, digits_models, tmp_path):
    """False claims of radius 3 on wrong classes are broken by attacks of norm 2.5 that climb from these classes."""
    log = certify("logs", "--N", 100, "--batch_size", 1000, "--alpha", 0.3, skip=1)
    table = pd.read_csv(log, sep="\t")
    wrong = table[(table["predict"] != table["label"]) & (table["predict"] >= 0)].assign(radius=3)
    assert len(wrong) >= 5
    wrong = wrong.head(8)
    path = tmp_path / "wrong.log"
    wrong.to_csv(path, sep="\t", index=False)
    code, out, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], path, "--radii", 2.5))
    assert code == 0, err
    attacked = pd.read_csv(next(tmp_path.rglob("wrong-attack.log")), sep="\t")
    assert attacked["broken"].mean() > 0.5 and out.count("is broken at 2.5") == attacked["broken"].sum()
    assert (attacked["correct"] == 0).all()  # wrong without an attack


def test_attacks_are_divided_and_merged_like_other_runs(certify, script, digits_models, tmp_path):
    """Also those on the log of one shard, whose name says so, too."""
    log = certify("logs", "--shard", "1/2", skip=30)
    flags = attack_flags(digits_models[0], log, "--radii", 0.5)
    assert script("0Gaussian/attack_mhead.py", *flags)[0] == 0
    (whole,) = tmp_path.rglob("*-attack.log")
    for shard in ("1/2", "2/2"):
        code, _, err = script("0Gaussian/attack_mhead.py", *flags, "--shard", shard, "--logs_dir", "shards")
        assert code == 0, err
    shards = sorted((tmp_path / "shards").rglob("*-attack-shard-*.log"))
    code, _, err = script("merge_logs.py", shards[0])
    assert code == 2 and "shard 2/2 is missing" in err
    code, _, err = script("relog.py", shards[1], "--alpha", 0.01)
    assert (code, err) == (0, ""), "a shard alone is a whole run"
    code, out, err = script("merge_logs.py", *shards)
    assert code == 0 and "empirical accuracy" in out, err
    assert without_time(shards[0].with_name(whole.name)) == without_time(whole)
    for path in (shards[1], beside(shards[1], "-counts.jsonl")):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    code, _, err = script("relog.py", shards[1], "--alpha", 0.01, "--overwrite")
    assert code == 0 and "is unfinished: 2 of 3 images" in err
    code, _, err = script("merge_logs.py", *shards, "--overwrite")
    assert code == 2 and "is not whole: it holds 2 of 3 images" in err


def test_a_log_without_configuration_at_another_sigma_is_a_warning(certify, script, digits_models, tmp_path):
    log = certify("logs", "--max", 30)
    elsewhere = tmp_path / "noise-0.25" / log.name
    elsewhere.parent.mkdir()
    log.rename(elsewhere)
    code, _, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], elsewhere, "--radii", 0.5))
    assert code == 0 and "is not checked, and its path says sigma 0.25, not 0.5" in err


@pytest.mark.parametrize(("content", "refused"), [("", False), ("idx\tlabel\nx\ty\n", True), ("no log at all\n", True)])
def test_an_attacks_log_that_was_changed_is_refused_and_an_empty_one_made_again(
    certify, script, digits_models, tmp_path, content, refused
):
    log = certify("logs", "--max", 30)
    flags = attack_flags(digits_models[0], log, "--radii", 0.5)
    assert script("0Gaussian/attack_mhead.py", *flags)[0] == 0
    (path,) = tmp_path.rglob("*-attack.log")
    before = without_time(path)
    path.write_text(content)
    code, _, err = script("0Gaussian/attack_mhead.py", *flags)
    if refused:
        assert code == 2 and err.count("\n") == 1 and "belong" in err and path.read_text() == content
    else:
        assert code == 0 and without_time(path) == before


def test_an_attack_on_top_k_certificates_is_refused(certify, script, digits_models):
    """They claim nothing of the class that is first: another one there breaks none of them."""
    assert script("relog.py", certify("logs", "--max", 100), "--top_k", 3)[0] == 0
    (log,) = Path("logs").rglob("*-top-3.log")
    code, _, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], log, "--radii", 0.5))
    assert code == 2 and err.count("\n") == 1 and "certifies more than one class (--top_k)" in err
