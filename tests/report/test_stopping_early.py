"""Sequential logs in a report: what they decided, what is a lower bound, what they may be compared with."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from conftest import beside, make_log, with_config
from scipy import stats
from test_members import shown

from spacte.logs.certified import certificate_of, certified, known_radii
from spacte.logs.certlog import read_log, read_table
from spacte.logs.config import RunConfig
from spacte.logs.counts import VoteCounts
from spacte.logs.runfiles import RunFiles
from spacte.logs.voting import Stopping
from spacte.report import plots
from spacte.report.comparison import compare
from spacte.report.reading import ReadOptions, read_runs
from spacte.smooth.bounds import anytime_lower_bound
from spacte.smooth.topk import TopK

RULE = {"radii": [0.25], "give_up": 0.01}


def log(path, by=0.0, **fields):
    """A log of 60 images whose radii grow from 0.2 on, each by 0.01 and `by`."""
    rows = [(idx, 1, 1, 0.2 + 0.01 * idx + by) for idx in range(60)]
    return with_config(make_log(path, rows), **fields)


def cells(out):
    """A markdown table's cells, by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return {title: [line[number] for line in lines[2:]] for number, title in enumerate(lines[0])}


def test_radii_that_were_not_decided_have_no_figure(script, tmp_path):
    """The rule asked about 0.25 alone; at 0, at 0.5, and of who abstained, more draws would tell more."""
    log(tmp_path / "x.log", sequential=RULE, noise_slack=0.0)
    _, out, _ = script("report.py", "x.log", "--radii", 0.25, 0.5, 9)
    found = cells(out)
    assert (found["clean"], found["abstained"], found["0.5"], found["0.25"]) == (["-"], ["-"], ["-"], ["0.917"])
    assert found["9"] == ["0.000"]  # no number of draws reaches it
    assert found["ACR"][0].startswith("≥ 0.495 ±")
    assert '--sequential ended draws early (radii 0.25): "≥" marks a lower bound, "-" a radius that was not' in out
    table = pd.read_csv(io.StringIO(script("report.py", "x.log", "--radii", 0.25, 0.5, "--format", "csv")[1]))
    assert table["stopping"].tolist() == ["radii 0.25"] and table["0.5"].isna().all() and table["ACR"][0] > 0
    _, out, _ = script("report.py", "x.log", "--radii", 0.25, "--format", "latex")
    assert r"$\geq$ 0.495" in out and "% --sequential ended draws early" in out


def test_a_radius_known_to_within_a_tolerance_is_a_lower_bound_everywhere(script, tmp_path):
    log(tmp_path / "x.log", sequential={"tolerance": 0.05})
    found = cells(script("report.py", "x.log", "--radii", 0.5)[1])
    assert (found["clean"], found["0.5"]) == (["≥ 1.000"], ["≥ 0.500"]) and found["ACR"][0].startswith("≥")
    assert not found["abstained"][0].startswith("≥")


def test_a_fixed_n_decides_every_radius(script, tmp_path):
    log(tmp_path / "x.log")
    _, out, _ = script("report.py", "x.log", "--radii", 0.25, 0.5)
    assert "≥" not in out and "draws" not in out and cells(out)["0.5"] == ["0.500"]


def test_what_a_rule_decides():
    config = RunConfig(noise_sd=0.5, N=1000, alpha=0.001, sequential=Stopping((0.0, 0.25), 0.01))
    assert known_radii(config, [0, 0.25, 0.3, 1.0, 2]).tolist() == [True, True, False, False, True]
    again = config.with_certificate(alpha=0.01)
    assert again.sequential == Stopping((0.0, 0.25), 0.01, decides=False)
    assert not known_radii(again, [0, 0.25]).any()
    assert config.with_certificate(alpha=0.001) == config  # it is what it was
    assert RunConfig.from_json(again.to_json()).sequential == again.sequential
    assert known_radii(None, [0, 3]).all()


def test_votes_that_stopped_early_are_certified_again_by_the_anytime_bound(certify, script):
    """What a log of another alpha, of a head or for top k says: the draws ended by a rule that looked at them."""
    log = certify("a", "--sequential", "--N", 2000)
    assert script("relog.py", log, "--alpha", 0.01)[0] == 0
    votes = [VoteCounts.from_line(line) for line in beside(log, "-counts.jsonl").open()]
    assert any(one.estimation[-1].sum() < 2000 for one in votes)
    rows = read_log(beside(log, "-alpha-0.01.log")).itertuples()
    for one, row in zip(votes, rows, strict=True):
        n_a, n = int(one.estimation[-1][one.selection[-1].argmax()]), int(one.estimation[-1].sum())
        low = anytime_lower_bound(n_a, n, 0.01)
        assert row.predict == -1 if low < 0.5 else row.radius == pytest.approx(0.5 * stats.norm.ppf(low), rel=1e-5)
    config = RunFiles(log).read_json().config
    again = [config.of_head(0), config.with_certificate(certificate="all-votes")]
    assert all(certificate_of(one).sequential for one in again)
    top, one = config.with_certificate(top_k=2), votes[0]
    rule = TopK(0.001, 0.5, 2, True, "cohen")
    assert certified(one, top) == rule(one.label, one.estimation[-1])


def test_the_log_says_sequential_and_an_older_one_resumes(certify):
    name = certify("a", "--sequential", "--max", 100)
    assert name.name.endswith("-sequential.log")
    new = certify("b", "--sequential", "--max", 100, "--certificate", "all-votes")
    assert new.name.endswith("-sequential-all-votes.log")
    older = [path.rename(path.with_name(path.name.replace("-sequential", ""))) for path in name.parent.iterdir()]
    certify("a", "--sequential")
    assert {path.name for path in name.parent.iterdir()} == {path.name for path in older}
    (run,) = read_runs([older[0].parent])
    assert len(run.log) == 12 and run.name == read_runs([new])[0].name


def test_draws_are_counted(script, certify):
    path = certify("a", "--sequential", "--max", 100)
    draws = [VoteCounts.from_line(line).estimation[-1].sum() for line in beside(path, "-counts.jsonl").open()]
    table = pd.read_csv(io.StringIO(script("report.py", path, "--format", "csv")[1]))
    assert table["draws"].tolist() == [pytest.approx(np.mean(draws))] and np.mean(draws) < 200
    assert cells(script("report.py", path)[1])["draws"] == [f"{np.mean(draws):.0f}"]
    beside(path, "-counts.jsonl").unlink()
    assert pd.read_csv(io.StringIO(script("report.py", path, "--format", "csv")[1]))["draws"].isna().all()


def test_the_heads_of_a_sequential_run_decided_nothing(certify):
    """The vote's draws ended when its own radii were decided."""
    runs = read_runs([certify("a", "--sequential", "--max", 100)], ReadOptions(heads=True))
    assert [run.knows_radii([0.25]).all() for run in runs] == [True, False, False, False]
    other = read_runs([runs[0].path], ReadOptions(certificate="all-votes"))
    same = read_runs([runs[0].path], ReadOptions(certificate="cohen"))
    assert not other[0].knows_radii([0.25]).any() and same[0].knows_radii([0.25]).all()


def compared(tmp_path, a, b):
    """Two logs that differ in every image, by the rules a and b."""
    log(tmp_path / "a.log", by=0.1, sequential=a)
    log(tmp_path / "b.log", sequential=b)
    return compare(*read_runs([tmp_path / "a.log", tmp_path / "b.log"]))


@pytest.mark.parametrize("other", [None, {"radii": [0.25, 0.5], "give_up": 0.01}, {"tolerance": 0.05}])
def test_across_stopping_rules_there_is_no_verdict_on_acrs(tmp_path, other):
    """But at the radii that both decided there is one."""
    found = compared(tmp_path, RULE, other)
    rule = str(Stopping.from_json(other)) if other else "a fixed N"
    assert found.sentences().startswith("No verdict on the ACRs")
    assert f"they stop by different rules (radii 0.25 and {rule}), and nothing tells how far" in found.sentences()
    table = found.table.set_index("figure")
    assert table.loc["ACR", ["difference", "low", "high"]].isna().all()
    at_025 = table.loc["0.25", ["difference", "low", "high"]].astype(float)
    if other == {"tolerance": 0.05}:  # it knows 0.25 as little as any other radius
        assert at_025.isna().all()
    else:
        assert at_025["difference"] == pytest.approx(5 / 60) and np.isfinite(at_025).all()
    assert table.loc["0.5"].isna().any() and np.isnan(table.loc["0.5", "difference"])
    assert np.isnan(table.loc["clean", "a"])


@pytest.mark.parametrize("rule", [RULE, {"tolerance": 0.05}])
def test_two_lower_bounds_by_one_rule_are_not_compared(tmp_path, rule):
    """A rule for the radii 0.25 and 0.5 logs 0.25 of a true 0.44, and 0.5 of 0.56: the difference may change its sign.

    At the radii that it decided there is a verdict. Under a tolerance there is none: nothing is decided exactly.
    """
    found = compared(tmp_path, rule, rule)
    assert found.sentences().startswith("No verdict") and ": both end draws early (" in found.sentences()
    table = found.table.set_index("figure")
    assert table.loc[["ACR", "0.5"], ["difference", "low", "high", "p_holm"]].isna().all(axis=None)
    decided = table.loc["0.25", ["difference", "low", "high"]].astype(float)
    assert np.isfinite(decided).all() if rule == RULE else decided.isna().all()


def test_a_comparison_shows_the_radii_by_which_a_run_stopped(script, tmp_path):
    log(tmp_path / "a.log", by=0.1, sequential={"radii": [0.3], "give_up": 0.01})
    log(tmp_path / "b.log", sequential={"radii": [0.3], "give_up": 0.01})
    content = json.loads(script("report.py", "--compare", "a.log", "b.log", "--format", "json")[1])
    rows = {row["figure"]: row for row in content["comparisons"][0]["table"]}
    assert rows["0.3"]["difference"] > 0 and rows["0.25"]["difference"] is None


def test_a_curve_has_dots_where_radii_were_decided(tmp_path):
    log(tmp_path / "x.log", sequential={"radii": [0.25, 0.5], "give_up": 0.01})
    (run,) = read_runs([tmp_path / "x.log"])
    (line,) = plots.curves([[run]]).axes[0].lines[-1:]
    assert line.get_xdata().tolist() == [0.25, 0.5] and line.get_linestyle() == "None"


def test_the_best_over_sigma_keeps_what_is_not_known(script, tmp_path):
    """Of two sigmas one decided 0.25 alone, the other 0.5 alone: neither has a best; a tolerance's is a lower bound."""

    def best(*rules):
        for sigma, rule in zip((0.25, 0.5), rules, strict=True):
            log(tmp_path / f"s-{sigma}.log", noise_sd=sigma, sequential=rule, defence="Own")
        return {title: column[-1] for title, column in cells(script(*flags)[1]).items()}

    flags = ("report.py", tmp_path, "--envelope", "--radii", 0.25, 0.5)
    found = best(RULE, {"radii": [0.5], "give_up": 0.01})
    assert (found["run"], found["0.25"], found["0.5"]) == ("best over sigma", "-", "-")
    assert best({"tolerance": 0.05}, {"tolerance": 0.1})["0.25"] == "≥ 0.917"


def test_members_of_a_sequential_run(script, certify):
    """The vote's rule was not about its members: no clean accuracy of theirs."""
    path = certify("a", "--sequential", "--radii", 0.25)
    table = pd.read_csv(io.StringIO(script("report.py", path, "--members", "--format", "csv")[1]))
    assert table["stopping"].tolist() == ["radii 0.25"] and table["ACR"].notna().all()
    assert table[["clean", "mean clean", "each clean"]].isna().all(axis=None)


@pytest.mark.parametrize("rule", [RULE, {"tolerance": 0.05}])
def test_lower_bounds_are_not_ranked(script, tmp_path, rule):
    """Of two rows the better one is bold where the radius was decided, not in the columns of lower bounds."""
    for name, by in (("a", 0.1), ("b", 0.0)):
        log(tmp_path / f"{name}.log", by=by, sequential=rule)
    found = cells(script("report.py", tmp_path, "--radii", 0.25)[1])
    assert not any("**" in cell for cell in found["ACR"]) and all(cell.startswith("≥") for cell in found["ACR"])
    assert any("**" in cell for cell in found["0.25"]) == (rule == RULE)


def test_pictures_of_votes_say_that_they_stopped_early(script, tmp_path):
    log(tmp_path / "x.log", sequential=RULE)
    code, _, err = script("report.py", "x.log", "--norm", "linf", "--ecdf", "e.svg", "--histogram", "h.svg")
    assert code == 0, err
    assert all("stopped early" in (tmp_path / name).read_text() for name in ("e.svg", "h.svg"))
    assert "0.03125" in script("report.py", "x.log", "--norm", "linf")[1]  # the radius that it decided, in Linf


def test_a_curve_without_a_point_is_said(script, certify):
    code, _, err = script("report.py", certify("a", "--sequential"), "--top_k", 3, "--curves", "c.png")
    assert code == 0 and "stopped early and decided no radius: it has no curve" in err


def test_a_table_whose_figures_are_bounds_says_so(certify, recwarn):
    """It is read by report.py, which marks them, without a word."""
    flags = ("--N", 1000, "--max", 100)
    early, whole = certify("a", *flags, "--sequential", "--radii", 0.25), certify("b", *flags)
    recwarn.clear()
    read_table(early)
    read_log(whole)
    assert not recwarn
    with pytest.warns(UserWarning, match="--sequential run's: its ACR is a lower bound, and so is certified accuracy"):
        read_log(early)


def test_classes_have_no_figure_at_a_radius_that_was_not_decided(script, tmp_path):
    with_config(make_log(tmp_path / "x.log", [(idx, 1, 1, 0.2 + 0.01 * idx) for idx in range(60)]), sequential=RULE)
    table, _ = shown(script, "x.log", "--by_class", 0.25)
    assert table["radius"].tolist() == [0, 0.25]
    assert table[["mean", "smallest", "1"]].loc[0].isna().all()
    assert table[["mean", "smallest", "1"]].loc[1].tolist() == pytest.approx([55 / 60] * 3)


def test_a_class_is_not_given_up_at_a_radius_that_was_not_decided(script, tmp_path):
    rows = [(idx, 1, 1, 0.5) for idx in range(10)] + [(10 + idx, 2, -1, 0.0) for idx in range(10)]
    for name, rule, says in (("fixed", None, True), ("early", RULE, False)):
        with_config(make_log(tmp_path / f"{name}.log", rows), sequential=rule)
        assert ("gives up class 2" in shown(script, f"{name}.log", "--by_class", 0.25)[1]) == says
