"""Certificates from all the votes: of the same draws as Cohen et al.'s, and of no others."""

import json

import pytest
from conftest import RUN_FLAGS, beside, without_time

from spacte.logs.certlog import read_log
from spacte.logs.counts import read_counts


def test_both_certificates_come_from_the_same_votes(certify, script):
    """The summary has a row of each whichever the log holds; relog makes one log from the other's votes."""
    papers, ours = certify("a", skip=20), certify("b", "--certificate", "all-votes", skip=20)
    assert ours.name == papers.name.replace(".log", "-all-votes.log")
    figures = [beside(log, "-ACR.log").read_text().split("\n")[2:] for log in (papers, ours)]
    rows = [[line.split(" | ")[6:-1] for line in lines if line] for lines in figures]  # without the run's name
    assert rows[0] == rows[1] and len(rows[0]) == 2
    kinds = [[line.split(" | ")[5].strip() for line in lines if line] for lines in figures]
    assert kinds == [["cohen", "all-votes"]] * 2
    radii = [read_log(log).eval("radius * correct") for log in (papers, ours)]
    assert radii[1].mean() > radii[0].mean()
    for line, own in zip(filter(None, figures[0]), radii, strict=True):
        assert f" {own.mean():.3f} ± " in line.replace("*", "")
    code, _, err = script("relog.py", papers, "--certificate", "all-votes")
    assert code == 0, err
    assert without_time(beside(papers, "-alpha-0.001-all-votes.log")) == without_time(ours)
    code, out, err = script("report.py", papers, "--certificate", "all-votes", "--heads")
    assert code == 0 and out.count("all-votes") >= 4 and f"{radii[1].mean():.3f}" in out
    code, out, _ = script("report.py", "--compare", papers, ours)
    assert code == 0 and "certificate cohen and all-votes" in out
    code, _, err = script("relog.py", ours, "--certificate", "cohen")
    assert code == 0, err
    assert without_time(ours.with_name(papers.stem + "-alpha-0.001-cohen.log")) == without_time(papers)
    flags = ("--certificate", "both", "--compare", papers, certify("c", "--seed", 1, skip=20))
    code, out, _ = script("report.py", papers, *flags, "--format", "json")
    content = json.loads(out)
    assert [one["certificate"] for one in content["logs"]] == ["cohen", "all-votes"]
    assert ["certificates from all votes" in one["sentences"] for one in content["comparisons"]] == [False, True]


def test_a_run_under_one_certificate_is_not_gone_on_with_under_another(certify, script, digits_models):
    log = certify("a", "--max", 60)
    content = json.loads(beside(log, ".json").read_text())
    del content["config"]["certificate"]  # as an older program left it
    beside(log, ".json").write_text(json.dumps(content))
    assert certify("a", "--max", 100) == log
    for ending in (".log", ".json", "-counts.jsonl"):
        path = beside(log, ending)
        path.rename(path.with_name(path.name.replace("skip-30", "skip-30-all-votes")))
    flags = ("--model_path", digits_models[0], "--logs_dir", "a", "--skip", 30, *RUN_FLAGS)
    code, _, err = script("0Gaussian/certify_mhead.py", *flags, "--certificate", "all-votes")
    assert code == 2 and "certificate (cohen there, all-votes here)" in err


@pytest.mark.parametrize("flags", [(), ("--radii", 0.25), ("--tolerance", 0.1)])
def test_all_votes_stop_early_too(certify, flags):
    """At the decided radii both agree but for what was given up; fewer draws are used than a fixed N."""
    common = ("--certificate", "all-votes", "--N", 4000, "--batch_size", 1000)
    fixed, early = certify("a", *common), certify("b", *common, "--sequential", *flags)
    used = [int(one.estimation[-1].sum()) for one in read_counts(beside(early, "-counts.jsonl"))]
    assert max(used) <= 4000 and sum(used) < 4000 * len(used) / 2
    shares = [(read_log(log).eval("radius * correct") >= 0.25).mean() for log in (fixed, early)]
    assert abs(shares[0] - shares[1]) <= 1 / 12 + 1e-9


def test_selection_votes_are_needed(certify, script):
    log = certify("a", "--max", 60)
    counts = beside(log, "-counts.jsonl")
    lines = [json.loads(line) for line in counts.read_text().splitlines()]
    counts.write_text(
        "".join(json.dumps(line | {"selection": [{} for _ in line["selection"]]}) + "\n" for line in lines)
    )
    code, _, err = script("relog.py", log, "--certificate", "all-votes")
    assert code == 2 and "line 1: not a vote count of this run: 0 selection and 200 estimation votes" in err
    content = json.loads(beside(log, ".json").read_text())
    del content["config"]["N0"]  # a file that does not say how many were to be drawn
    beside(log, ".json").write_text(json.dumps(content))
    code, _, err = script("relog.py", log, "--certificate", "all-votes")
    assert code == 2 and "holds no selection votes" in err


@pytest.mark.parametrize("command", [("relog.py", "--alpha", 0.01), ("report.py", "--certificate", "cohen")])
def test_votes_of_other_draws_than_the_runs_are_no_certificates(certify, script, command, digits_models):
    """One flipped digit: 981 of 1,000 draws where 181 of 200 were; every voter alike."""
    log = certify("a", "--max", 60)
    counts = beside(log, "-counts.jsonl")
    name, *flags = command
    assert script(name, log, *flags)[0] == 0
    first, *others = counts.read_text().splitlines()
    line = json.loads(first)
    line["estimation"] = [{k: 5 * n for k, n in votes.items()} for votes in line["estimation"]]
    counts.write_text("\n".join([json.dumps(line), *others, ""]))
    code, _, err = script(name, log, *flags, *["--overwrite"] * (name == "relog.py"))
    assert code == 2 and "selection and 1000 estimation votes, where N0 is 20 and N 200" in err
