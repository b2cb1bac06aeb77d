"""Certificates in other norms, and for top k, in a report."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from conftest import beside, make_log, random_log, with_config

from spacte.logs.counts import read_counts
from spacte.logs.table import radius_names, table_radii
from spacte.report import plots
from spacte.report.comparison import compare
from spacte.report.reading import ReadOptions, read_runs
from spacte.report.recount import label_probabilities
from spacte.smooth.topk import TopK
from spacte.utils import UserError


def test_the_balls_lie_in_the_l2_ball():
    """Any step whose L1 norm is r, or Linf norm r / sqrt(d), is at most r long in L2; some reach it."""
    rng, d = np.random.default_rng(0), 64
    steps = np.concatenate([rng.normal(size=(1000, d)), np.eye(d)[:1], np.ones((1, d))])
    long = np.linalg.norm(steps, axis=1)
    for norm, per_l2 in ((1, 1.0), (np.inf, d**-0.5)):
        ratio = long * per_l2 / np.linalg.norm(steps, norm, axis=1)
        assert ratio.max() == pytest.approx(1) and (ratio <= 1 + 1e-12).all()


def test_radii_in_linf_and_l1(script, tmp_path):
    """digits has 64 values: an Linf radius is an eighth of the L2 one, rounded down; L1's is the same."""
    with_config(make_log(tmp_path / "x.log", [(0, 1, 1, 1.0), (1, 1, 1, 0.3333335), (2, 2, 1, 0.9)]))
    runs = {norm: read_runs([tmp_path / "x.log"], ReadOptions(norm=norm))[0] for norm in ("l2", "linf", "l1")}
    assert runs["linf"].log["radius"].tolist() == [0.125, 0.0416666, 0.1125]
    assert runs["l1"].log["radius"].tolist() == runs["l2"].log["radius"].tolist()
    flags = ("report.py", "x.log", "--norm", "linf", "--radii", "2/255", "8/64", "31/240")
    table = pd.read_csv(io.StringIO(script(*flags, "--format", "csv")[1]))
    assert table[["2/255", "0.125"]].iloc[0].tolist() == [2 / 3, 1 / 3] and table["norm"].tolist() == ["linf"]
    assert table["ACR"][0] == pytest.approx((0.125 + 0.0416666) / 3)
    _, out, _ = script(*flags)
    assert "| norm" in out and "0.05556 ± 0.03675" in out and "2/255" in out
    assert "| norm" not in script("report.py", "x.log")[1]
    assert r"0.05556 $\pm$ 0.03675" in script(*flags, "--format", "latex")[1]


def test_the_dimension_is_the_datas_or_noted(script, tmp_path):
    def per_l2(**fields):
        path = with_config(random_log(tmp_path / "y.log", 10, 0), **fields)
        return read_runs([path], ReadOptions(norm="linf"))[0].per_l2

    assert per_l2(dataset="CIFAR10") == 3072**-0.5
    with pytest.raises(UserError, match=r"'.*y\.log': --norm linf needs the images' size"):
        per_l2(dataset="ImageFolder")
    path = tmp_path / "y.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"about": {"image_shape": [3, 10, 10]}}))
    assert read_runs([tmp_path / "y.log"], ReadOptions(norm="linf"))[0].per_l2 == pytest.approx(300**-0.5)
    code, _, err = script("report.py", random_log(tmp_path / "own" / "z.log", 10, 0), "--norm", "linf")
    assert code == 2 and err.count("\n") == 1 and "needs the images' size" in err
    assert script("report.py", tmp_path / "own" / "z.log", "--norm", "l1")[0] == 0


def test_a_certification_notes_the_images_shape(certify):
    assert json.loads(beside(certify("a", "--max", 60), ".json").read_text())["about"]["image_shape"] == [1, 8, 8]


def test_comparisons_and_pictures_say_the_norm(tmp_path):
    for name, by in (("a", 0.2), ("b", 0.0)):
        with_config(random_log(tmp_path / f"{name}.log", 300, 0, by))
    a, b = read_runs([tmp_path], ReadOptions(norm="linf"))
    found = compare(a, b)
    assert (
        found.sentences().startswith("The Linf ACR of") and " is higher" in found.sentences() and found.norm == "linf"
    )
    figures = found.table["figure"].tolist()
    assert all(name.endswith("/255") for name in figures[2:])
    assert all(f" {found.table['difference'][0]:.5f} " in found.text(style) for style in ("markdown", "latex"))
    assert set(found.rows()["norm"]) == {"linf"}
    plain = compare(*read_runs([tmp_path]))
    assert found.table["difference"][0] == pytest.approx(plain.table["difference"][0] / 8, rel=1e-3)
    assert plots.curves([[a]]).axes[0].get_xlabel() == "Linf radius"
    assert plots.histogram([a]).axes[0].get_xlabel() == "certified Linf radius"


def test_radii_of_a_linf_table():
    assert table_radii(8.5 / 255, "CIFAR10", "linf") == pytest.approx(np.arange(9) / 255)
    wide = table_radii(0.25, "digits", "linf")
    assert wide[1] == pytest.approx(8 / 255) and len(wide) <= 13
    assert radius_names([0, 2 / 255, 0.125], "linf") == ["0", "2/255", "0.125"]
    assert radius_names([2 / 255]) == ["0.007843137255"]
    assert radius_names([2.05 / 255], "linf") == ["0.008039215686"], "not 2/255, which is another radius"


@pytest.mark.parametrize("text", ["2/0", "1/-3", "x/255", "2/255/3", "nan/2"])
def test_radii_that_are_none(script, tmp_path, text):
    random_log(tmp_path / "x.log", 10, 0)
    code, _, err = script("report.py", "x.log", f"--radii={text}")
    assert code == 2 and f"'{text}' must be a number of at least 0, or a fraction like 2/255" in err


def test_a_sequential_rule_decides_radii_of_every_norm(tmp_path):
    with_config(random_log(tmp_path / "x.log", 30, 0), sequential={"radii": [0.25], "give_up": 0.01}, noise_slack=0.0)
    (run,) = read_runs([tmp_path / "x.log"], ReadOptions(norm="linf"))
    assert run.knows_radii([0.25 / 8, 0.25]).tolist() == [True, True] and not run.knows_radii([0.5 / 8]).any()


# --- top k ---


def test_top_k_is_what_the_votes_certify(script, certify):
    """The label's votes against the strongest others'; relog.py writes what report.py computes."""
    path = certify("a")
    counts = read_counts(beside(path, "-counts.jsonl"))
    (run,) = read_runs([path], ReadOptions(certificate="all-votes", top_k=3))
    rule = TopK(0.001, 0.5, 3, kind="all-votes")
    for one, row in zip(counts, run.log.itertuples(), strict=True):
        predict, radius = rule(one.label, one.estimation[-1])
        assert row.predict == predict in (one.label, -1) and row.radius == pytest.approx(radius, rel=1e-5)
    code, out, err = script("relog.py", path, "--top_k", 3, "--certificate", "all-votes")
    assert code == 0, err
    written = path.with_name(path.stem + "-alpha-0.001-all-votes-top-3.log")
    assert f"log: {written}" in out
    assert script("relog.py", written, "--alpha", 0.05, "--head", 1)[0] == 0  # how it is certified stands there once
    assert path.with_name(path.stem + "-alpha-0.05-all-votes-top-3-head-1.log").exists()
    (again,) = read_runs([written])
    assert again.log["radius"].tolist() == run.log["radius"].tolist() and again.certificate == "all-votes top 3"
    top_1 = read_runs([path], ReadOptions(certificate="all-votes"))[0]
    assert (run.log["correct"] >= top_1.log["correct"]).all() and run.log["radius"].mean() > top_1.log["radius"].mean()


def test_top_k_in_a_report(script, certify):
    path = certify("a")
    _, out, _ = script("report.py", path, "--top_k", 2, "--certificate", "both", "--format", "csv")
    assert pd.read_csv(io.StringIO(out))["certificate"].tolist() == ["cohen top 2", "all-votes top 2"]
    _, out, _ = script("report.py", path, "--top_k", 2, "--norm", "linf", "--heads", "--members", "--by_class", "2/255")
    assert "cohen top 2" in out and "linf" in out
    code, _, err = script("report.py", path, "--top_k", 10)
    assert code == 2 and "--top_k 10: of 10 classes, choose 2 to 9" in err
    assert "take at least 2" in script("report.py", path, "--top_k", 1)[2]
    code, _, err = script("relog.py", path, "--top_k", 1)
    assert code == 2 and "choose 2 to 9" in err


def test_top_k_of_sequential_votes_decides_nothing(certify):
    (run,) = read_runs([certify("a", "--sequential")], ReadOptions(top_k=2))
    assert not run.knows_radii([0, 0.25]).any() and run.config.sequential.decides is False


def test_top_k_needs_votes_on_every_image(script, certify):
    code, _, err = script("report.py", certify("a", "--skip_wrong"), "--top_k", 2)
    assert code == 2 and err.count("\n") == 1 and "made with --skip_wrong" in err


def test_a_comparison_says_top_k(certify, digits_models):
    sides = [read_runs([certify(name, models=[model])], ReadOptions(top_k=2))[0]
             for name, model in zip("ab", digits_models, strict=True)]  # fmt: skip
    assert "certificates for top 2" in compare(*sides).sentences()
    mixed = compare(sides[0], read_runs([sides[1].path])[0])
    assert "top_k 2 and 1" in mixed.sentences() and math.isfinite(mixed.table["a"][0])


def test_the_probabilities_do_not_depend_on_the_norm(tmp_path):
    """Of a log without votes: those that its radii imply."""
    log = with_config(make_log(tmp_path / "x.log", [(0, 1, 1, 0.4), (1, 1, 2, 0.4), (2, 1, 1, 0.0)]))
    (run,) = read_runs([log])
    found = label_probabilities(run)
    assert found == pytest.approx([0.788145, 0, 0.5], abs=1e-5)
    assert label_probabilities(run.in_norm("linf")) == pytest.approx(found, abs=1e-4)
