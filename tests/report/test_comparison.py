"""Two logs compared image by image."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from conftest import EXCERPTS, make_log, random_log, with_config

from spacte.logs import certlog
from spacte.report import comparison
from spacte.report.comparison import _named, compare, compare_experiments
from spacte.report.intervals import holm
from spacte.report.reading import read_runs


def runs_of(tmp_path, *logs):
    by_path = {run.path: run for run in read_runs(list(logs))}
    return [by_path[log] for log in logs]


def test_p_values_are_adjusted_for_all_rows(tmp_path, monkeypatch):
    runs = read_runs([random_log(tmp_path / f"{seed}.log", 300, seed, shift=0.05 * seed) for seed in (1, 2)])
    adjusted = compare(*runs).table["p_holm"].to_numpy()
    monkeypatch.setattr(comparison, "holm", lambda p: p)
    raw = compare(*runs).table["p_holm"].to_numpy()
    assert np.array_equal(adjusted, holm(raw), equal_nan=True) and not np.array_equal(adjusted, raw, equal_nan=True)


def test_a_paired_difference_and_its_interval(tmp_path):
    """On 2,000 images the interval is the normal one, mean +- 1.96 standard errors, to within 1 %."""
    logs = [
        random_log(tmp_path / f"{name}.log", 2000, seed, shift)
        for seed, (name, shift) in enumerate([("a", 0.2), ("b", 0)])
    ]
    a, b = runs_of(tmp_path, *logs)
    found = compare(a, b, [0.5])
    each = certlog.certified_radius(a.log) - certlog.certified_radius(b.log)
    acr = found.table.iloc[0]
    half = 1.96 * each.std(ddof=1) / 2000**0.5
    assert acr["difference"] == pytest.approx(each.mean(), abs=1e-12)
    assert acr["high"] - acr["difference"] == pytest.approx(half, rel=0.01)
    assert acr["difference"] - acr["low"] == pytest.approx(half, rel=0.01)
    assert found.table["figure"].tolist() == ["ACR", "clean", "0.5"]
    share = certlog.certified_accuracy(a.log, [0.5]) - certlog.certified_accuracy(b.log, [0.5])
    assert found.table.iloc[2]["difference"] == pytest.approx(share[0], abs=1e-12)
    assert 0 < found.table.iloc[2]["low"] < share[0] < found.table.iloc[2]["high"]
    interval = f"{acr['difference']:.3f}, 95 % interval {acr['low']:.3f} to {acr['high']:.3f} (paired t)"
    says = f"The ACR of 'a' is higher than that of 'b': the first less the second is {interval}"
    alone = "One run each: the interval is for other images, not for other trainings."
    assert found.sentences() == f"{says}, on the same 2000 images.\n{alone}"


def test_a_sentence_and_its_table_have_one_sign(tmp_path):
    a, b = runs_of(tmp_path, *(random_log(tmp_path / f"{name}.log", 500, 0, by) for name, by in (("a", 0), ("b", 0.2))))
    found = compare(a, b, [0.5])
    difference, low, high = (f"{found.table.iloc[0][name]:.3f}" for name in ("difference", "low", "high"))
    assert high.startswith("-")
    text = f"'a' is lower than that of 'b': the first less the second is {difference}, 95 % interval {low} to {high}"
    assert text in found.sentences()


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (-0.1, 0.0)])
def test_an_interval_that_ends_at_0_tells_no_difference(tmp_path, low, high):
    found = compare(*read_runs([random_log(tmp_path / f"{seed}.log", 60, seed) for seed in (1, 2)]))
    found.table.loc[0, ["low", "high"]] = low, high
    assert "do not differ measurably" in found.sentences()


def test_pairing_sees_what_two_separate_errors_would_hide(tmp_path):
    """A log that is another plus 0.01 on every right image differs from it, though both errors are far larger."""
    log = random_log(tmp_path / "a.log", 300, 0)
    table = certlog.read_log(log)
    rows = zip(table["idx"], table["label"], table["predict"], table["radius"] + 0.01, strict=True)
    a, b = runs_of(tmp_path, make_log(tmp_path / "b.log", rows), log)
    assert compare(a, b).table.iloc[0]["low"] > 0 and certlog.acr_standard_error(a.log) > 0.015


def test_equal_logs_do_not_differ(tmp_path):
    a, b = runs_of(tmp_path, random_log(tmp_path / "a.log", 50, 0), random_log(tmp_path / "b.log", 50, 0))
    found = compare(a, b)
    assert (found.table["difference"] == 0).all() and (found.table["low"][1:] < 0).all()
    assert found.sentences().startswith("No verdict") and "of 0 images differ" in found.sentences()


@pytest.mark.parametrize(("images", "step", "reason"), [(49, 1e-4, "fewer than 50"), (50, 0, "all by the same")])
def test_too_few_images_or_equal_differences_give_no_verdict(tmp_path, script, images, step, reason):
    """Radii that are higher by 0.1 and a little more on each image; nothing of it may warn."""
    a = make_log(tmp_path / "a.log", [(idx, 1, 1, 0.6 + step * idx) for idx in range(images)])
    b = make_log(tmp_path / "b.log", [(idx, 1, 1, 0.5) for idx in range(images)])
    code, out, err = script("report.py", "--compare", a, b)
    assert code == 0 and not err and "No verdict on the ACRs of 'a' and 'b'" in out
    assert f"the radii of {images} images differ, {reason}" in out and "nan" not in out
    content = json.loads(script("report.py", "--compare", a, b, "--format", "json")[1])
    assert content["comparisons"][0]["table"][0]["low"] is None


def test_fifty_images_that_differ_give_a_verdict(tmp_path):
    a = make_log(tmp_path / "a.log", [(idx, 1, 1, 0.6 + 1e-4 * idx) for idx in range(50)])
    b = make_log(tmp_path / "b.log", [(idx, 1, 1, 0.5) for idx in range(50)])
    assert (
        "is higher than that of 'b': the first less the second is 0.102"
        in compare(*runs_of(tmp_path, a, b)).sentences()
    )


@pytest.mark.parametrize("different", [49, 80])
def test_experiments_have_the_intervals_conditions_of_single_runs(tmp_path, script, different):
    """80 images, all right, so that all accuracies at 0 agree; the radii of some differ."""
    for side in "ab":
        for seed in range(3):
            more = [(side == "a") * (0.1 + 1e-3 * idx) * (idx < different) for idx in range(80)]
            rows = [(idx, 1, 1, 0.5 + 0.01 * seed + more[idx]) for idx in range(80)]
            make_log(tmp_path / side / f"seed-{seed}" / "run.log", rows)
    (found,) = json.loads(script("report.py", "--compare", "a", "b", "--format", "json")[1])["comparisons"]
    acr, clean = found["table"][:2]
    assert clean["low"] < 0 < clean["high"], "an image more on each side is counted"
    assert (acr["low"] is None) == ("No verdict" in found["sentences"]) == (different < 50)


def test_two_experiments_are_compared_over_their_seeds(tmp_path, script):
    """Three seeds against two: means over all of them, and the sentence says so; an experiment is one kind of run."""
    for side, shift, seeds in (("a", 0.2, 3), ("b", 0.0, 2)):
        for seed in range(seeds):
            random_log(tmp_path / side / f"seed-{seed}" / "run.log", 400, seed + 10 * seeds, shift)
    code, out, err = script("report.py", "--compare", "a", "b", "--format", "json")
    assert code == 0, err
    (found,) = json.loads(out)["comparisons"]
    logs = [[certlog.read_log(log) for log in (tmp_path / side).rglob("*.log")] for side in "ab"]
    means = [np.mean([certlog.average_certified_radius(log) for log in side]) for side in logs]
    acr = found["table"][0]
    assert found["seeds"] == [3, 2] and (acr["a"], acr["b"]) == pytest.approx(means, abs=1e-9)
    assert acr["low"] < acr["difference"] < acr["high"] and acr["low"] > 0
    assert "(t over images and seeds), on the same 400 images." in found["sentences"]
    assert "The means over 3 and 2 runs are compared." in found["sentences"]
    assert "' tell little of how seeds vary: a 95 % interval may miss in up to 14 %" in found["sentences"]
    code, out, _ = script("report.py", "--compare", "a/seed-0/run.log", "b")
    assert code == 0 and "No verdict on the ACRs of 'a' and 'b'" in out
    assert "Of 'a' there is one run: the 2 of 'b' are too few to tell how much another would differ." in out
    code, out, _ = script("report.py", "--compare", "a", "b/seed-0/run.log")
    assert "Of 'b' there is one run: another is taken to differ as much as those of 'a' do." in out
    random_log(tmp_path / "a" / "seed-3" / "other.log", 400, 0)
    code, _, err = script("report.py", "--compare", "a", "b")
    assert code == 2 and "are not two seeds of one experiment: give the folder of one" in err


def test_one_classifier_certified_twice_is_no_matter_of_trainings(tmp_path):
    logs = [with_config(random_log(tmp_path / f"{seed}.log", 300, seed), checkpoint_sha256=["ab"]) for seed in (1, 2)]
    assert "One run each" not in compare(*runs_of(tmp_path, *logs)).sentences()
    with_config(logs[1], checkpoint_sha256=["ab", "cd"])
    assert "One run each" in compare(*runs_of(tmp_path, *logs)).sentences(), "an ensemble of that network and another"


@pytest.mark.parametrize("hashed", [True, False])
def test_what_all_seeds_took_from_the_same_files_is_said(tmp_path, script, hashed):
    """Seeds without teachers, seeds with the same two; by the names where one run has recorded no hash."""
    for side, teachers in (("a", []), ("b", ["1.pth", "2.pth"])):
        for seed in range(3):
            log = random_log(tmp_path / side / f"seed-{seed}" / "run.log", 100, seed)
            inputs = {"inputs": {"teachers": ["1" * 64, "2" * 64]}} if teachers and (hashed or seed) else {}
            with_config(log, [{"seed": seed, "teachers": teachers} | inputs])
    code, out, err = script("report.py", "--compare", "a", "b")
    assert code == 0, err
    assert out.count("took the same") == 1
    assert "All 3 runs of 'b' took the same teachers: what another would change is not in the interval." in out


def test_one_network_borrows_no_variance_of_ensembles_unsaid(tmp_path, script):
    for side, networks, seeds in (("one", [1], 1), ("two", [1, 1], 3), ("five", [1] * 5, 1)):
        for seed in range(seeds):
            with_config(random_log(tmp_path / side / f"seed-{seed}" / "run.log", 100, seed), num_heads=networks)
    says = "'one' has fewer networks than those, and runs of fewer vary more: the interval is too narrow."
    assert says in script("report.py", "--compare", "one", "two")[1]
    assert says in script("report.py", "--compare", "two", "one")[1]
    assert "too narrow" not in script("report.py", "--compare", "five", "two")[1]


def test_images_that_do_not_match_are_counted_and_named(tmp_path, script):
    rows = [(idx, 1, 1, 0.5) for idx in range(0, 100, 5)]
    a = make_log(tmp_path / "a.log", [*rows, (7, 1, 1, 0.9)])
    b = make_log(tmp_path / "b.log", rows[4:])
    code, out, _ = script("report.py", "--compare", a, b)
    assert code == 0 and "on the same 16 images" in out
    assert "Left out, only in 'a': 5 images, idx 0, 5, 7, 10, 15." in out
    c = make_log(tmp_path / "c.log", [(3, 1, 1, 0.5)])
    code, _, err = script("report.py", "--compare", a, c)
    assert code == 2 and "fewer than 2 images in common" in err
    make_log(c, [(3, 1, 1, 0.5), (5, 1, 1, 0.5)])
    assert "fewer than 2 images in common" in script("report.py", "--compare", a, c)[2]


def test_images_are_matched_by_their_numbers_not_by_their_lines(tmp_path):
    log = random_log(tmp_path / "a.log", 60, 0)
    header, *rows = log.read_text().splitlines(keepends=True)
    (tmp_path / "b.log").write_text(header + "".join(rows[::-1]))
    found = compare(*runs_of(tmp_path, log, tmp_path / "b.log"), [0.25])
    assert found.different == 0 and (found.table["difference"] == 0).all() and found.images == 60
    (tmp_path / "b.log").write_text(header + "".join(rows[1:][::-1]))
    assert compare(*runs_of(tmp_path, log, tmp_path / "b.log"), [0.25]).images == 59


def test_certificates_of_two_kinds_have_no_common_name(tmp_path):
    logs = [random_log(tmp_path / f"{name}.log", 60, seed) for seed, name in enumerate("ab")]
    for kinds, common, says in (
        (("cohen", "cohen"), "cohen", False),
        (("all-votes", "all-votes"), "all-votes", True),
        (("all-votes", "cohen"), "", False),
        (("cohen", "all-votes"), "", False),
    ):
        for log, kind in zip(logs, kinds, strict=True):
            with_config(log, certificate=kind)
        found = compare(*runs_of(tmp_path, *logs))
        assert found.certificate == common and ("certificates from all votes." in found.sentences()) == says
        assert ("differently: certificate" in found.sentences()) == (kinds[0] != kinds[1])


def test_the_rows_of_a_comparison_say_which_side_has_how_many_runs(tmp_path):
    for side, seeds in (("a", 3), ("b", 2)):
        for seed in range(seeds):
            random_log(tmp_path / side / f"seed-{seed}" / "run.log", 60, seed + 10 * seeds)
    a, b = (read_runs([tmp_path / side]) for side in "ab")
    found = compare_experiments(a, b)
    rows = found.rows()
    assert set(rows["runs_a"]) == {3} and set(rows["runs_b"]) == {2} and set(rows["images"]) == {60}
    assert rows["value_a"].tolist() == found.table["a"].tolist() != rows["value_b"].tolist()


def test_idx_are_abbreviated_without_a_gap():
    far = [i for i in range(10_000) if i % 20]
    assert _named(far) == "1-19, 21-39, 41-59, 61-79, 81-99, 101-119 and 9386 more (all of them with --format json)"
    assert _named([0, 1, 2, 3, 4, 7, 20, 40, 60, 80, 81]) == "0-4, 7, 20, 40, ..., 80, 81"
    assert _named([5]) == "5" and _named([1, 2, 4]) == "1, 2, 4"


def test_each_log_against_a_baseline(script):
    (baseline,) = EXCERPTS.glob("0Gaussian/noise-0.25/*/*.log")
    code, out, _ = script("report.py", EXCERPTS, "--baseline", baseline)
    assert code == 0 and out.count("the ACRs of") == 2 and out.count("| ACR ") == 2
    assert out.count("'Gaussian, 5 heads, sigma 0.25'") == 2
    code, _, err = script("report.py", baseline, "--baseline", baseline)
    assert code == 2 and "there is no other log to compare with it" in err
    code, out, err = script("report.py", EXCERPTS, "--baseline", baseline, "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    assert code == 0 and err.count("the ACRs of") == 2 and len(table["a"].unique()) == 2
    assert set(table["b"]) == {"Gaussian, 5 heads, sigma 0.25"} and set(table["images"]) == {25}


def test_rows_of_both_certificates_are_told_apart(script, digits_models, certify):
    five, one = certify("a"), certify("b", models=digits_models[1:])
    code, out, _ = script("report.py", "--compare", five, one, "--certificate", "both", "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    assert code == 0 and set(table["certificate"]) == {"cohen", "all-votes"} and not table.duplicated("value_a").all()


def test_heads_alone_are_compared_with_a_baseline(script, digits_models, certify):
    five, one = certify("a"), certify("b", models=digits_models[1:])
    code, out, _ = script("report.py", five, "--heads", "--baseline", one, "--format", "json")
    names = [each["a"] for each in json.loads(out)["comparisons"]]
    assert code == 0 and len(set(names)) == 4 and sum("head " in name for name in names) == 3


def test_heads_alone_need_the_counts_of_the_log(script, certify):
    log = certify("a")
    counts = log.with_name(log.name.replace(".log", "-counts.jsonl"))
    lines = counts.read_text().splitlines(keepends=True)
    counts.write_text("".join(lines[1:]))
    code, _, err = script("report.py", log, "--heads")
    assert code == 2 and "holds other images than" in err
    counts.unlink()
    code, out, err = script("report.py", log, "--heads", "--format", "json")
    assert code == 0 and len(json.loads(out)["logs"]) == 1 and "no vote counts lie beside" in err


def test_certifications_that_were_made_differently_say_so(tmp_path):
    logs = [random_log(tmp_path / f"{name}.log", 20, 0) for name in "ab"]
    config = {"dataset": "digits", "arch": "R8", "num_heads": [1], "noise_sd": 0.5, "head": None, "alpha": 0.001}
    for log, n in zip(logs, (1000, 100_000), strict=True):
        log.with_suffix(".json").write_text(json.dumps({"config": config | {"N": n}, "about": {}}))
    assert compare(*runs_of(tmp_path, *logs)).sentences().endswith("certified differently: N 1000 and 100000.")


def test_logs_of_two_hashes_are_perhaps_not_of_the_same_images(script, tmp_path):
    for name, sha256 in (("a", "11"), ("b", "22"), ("c", "11")):
        with_config(random_log(tmp_path / f"{name}.log", 20, 0), data_sha256=sha256)
    assert script("report.py", "--compare", "a.log", "c.log")[::2] == (0, "")
    code, _, err = script("report.py", "--compare", "a.log", "b.log")
    assert code == 2 and "'a.log' and 'b.log' cannot be compared image by image: two data_sha256" in err
    assert err.count("\n") == 1
    code, out, err = script("report.py", "a.log", "b.log", "c.log", "--format", "json", "--html", "page.html")
    assert code == 0 and "two data_sha256, so perhaps not the same images; they are not ranked together" in err
    assert [row["group"] for row in json.loads(out)["logs"]] == [1, 2, 1]
    assert "perhaps not the same images" in (tmp_path / "page.html").read_text()
    remark = "Group 2 is not ranked with group 1: two data_sha256."
    assert remark in (tmp_path / "page.html").read_text()
    assert script("report.py", "a.log", "b.log", "c.log")[1].endswith(f"\n\n{remark}\n")


def test_images_differ_by_their_means_over_the_seeds(tmp_path):
    for side in "ab":
        for seed in range(2):
            more = 0.1 if (side, seed) == ("a", 1) else 0
            rows = [(idx, 1, 1, 0.5 + more * (idx < 10)) for idx in range(60)]
            make_log(tmp_path / side / f"seed-{seed}" / "run.log", rows)
    a, b = (read_runs([tmp_path / side]) for side in "ab")
    assert compare_experiments(a, b).different == 10
