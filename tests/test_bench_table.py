"""The table of certified accuracy, the authors' way and ours: its rows say what was drawn and what was not."""

import json

import numpy as np
import pytest
from conftest import CODES, beside

from spacte.logs.certlog import average_certified_radius, read_log
from spacte.logs.counts import VoteCounts, read_counts
from spacte.smooth.certificates import Certificate


@pytest.fixture
def table(script, digits_models, tmp_path):
    """table(*flags) -> what was printed, and the JSON."""

    def run(*flags):
        always = ("--model_path", digits_models[0], "--device", "cpu", "--skip", 30, "--N", 400, "--batch_size", 100)
        code, out, err = script("bench/bench.py", "--task", "table", *always, *flags, "--json", tmp_path / "table.json")
        assert code == 0, err
        return out, json.loads((tmp_path / "table.json").read_text())

    return run


def test_the_second_row_is_what_certify_mhead_logs(table, certify):
    log = certify("logs", "--N0", 100, "--N", 400)
    _, content = table("--ways", "sequential", "--share", 0.5)
    authors, second, sequential = content["rows"]
    assert [row["way"] for row in content["rows"]] == ["authors'", "fp32", "sequential"]
    assert second["ACR"] == pytest.approx(average_certified_radius(read_log(log)), abs=1e-9)
    assert second["N"] == sequential["N"] == 400 and authors["N"] == 200
    assert authors["draws"] == second["draws"] == 12 * 500 > sequential["draws"]
    for row in content["rows"]:
        assert row["ratio"] == pytest.approx(authors["seconds"] / row["seconds"], rel=1e-6)


def test_radii_that_a_share_of_the_draws_cannot_reach_are_empty(table):
    _, content = table("--ways", "--share", 0.1)
    authors, second = content["rows"]
    within = Certificate(0.001, 0.5).radius(40, 0, 40, 10)
    radii = [name for name in authors if name[0].isdecimal()]
    assert [name for name in radii if authors[name] is None] == [name for name in radii if float(name) > within] != []
    assert None not in second.values()
    (comparison,) = content["against_second_row"].values()
    assert [row["figure"] for row in comparison] == ["ACR", "clean", *(name for name in radii if float(name) <= within)]


def test_a_consensus_needs_more_heads(table):
    out, content = table("--ways", "consensus", "--consensus", 3)
    assert "consensus: left out; K must be at least 2 and below the number of heads, 3" in out
    assert [row["way"] for row in content["rows"]] == ["authors'", "fp32"]
    _, content = table("--ways", "consensus", "--consensus", 2)
    assert [row["way"] for row in content["rows"]] == ["authors'", "fp32", "consensus"]


def test_thinned_votes_are_some_of_them(certify, monkeypatch):
    monkeypatch.syspath_prepend(str(CODES))
    from bench_table import _thinned

    for counts in read_counts(beside(certify("logs"), "-counts.jsonl")):
        few = _thinned(counts, 50, np.random.default_rng(0))
        assert isinstance(few, VoteCounts) and few.estimation.sum() == 50
        assert (few.estimation[-1] <= counts.estimation[-1]).all()
        assert (few.selection == counts.selection[-1:]).all() and few.label == counts.label


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--share", 1.5), "'1.5' must be above 0 and at most 1"),
        (("--N", 100, "--share", 0.05), "--N 5 at --alpha 0.001 can never certify"),
        (("--skip", 1000), "choose one image: a comparison needs 2 or more"),
    ],
)
def test_what_cannot_be_compared_is_said_before_it_is_measured(script, digits_models, flags, message):
    code, out, err = script(
        "bench/bench.py", "--model_path", digits_models[0], "--device", "cpu", *flags, "--task", "table"
    )
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
