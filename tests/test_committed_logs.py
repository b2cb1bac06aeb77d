"""What lies in logs_certification: rows that their votes give, and README's picture made from them."""

import re

import pytest
from conftest import ROOT

from spacte.report.reading import read_runs
from spacte.report.recount import certified_again

QUEUES = sorted(path for path in (ROOT / "logs_certification").iterdir() if path.is_dir())


@pytest.mark.parametrize("queue", QUEUES, ids=lambda path: path.name)
def test_every_committed_log_is_what_its_votes_give(queue):
    columns = ["idx", "label", "predict", "radius", "correct"]
    runs = read_runs([queue])
    assert len(runs) == len([log for log in queue.rglob("certify-mhead/*.log") if "ACR" not in log.name])
    for run in runs:
        assert certified_again(run, run.certificate).log[columns].equals(run.log[columns]), run.path
        summary = run.path.with_name(run.path.stem + "-ACR.log").read_text()
        assert "| cohen " in summary and "| all-votes " in summary


def test_no_configuration_names_a_machines_folders():
    for path in (ROOT / "logs_certification").rglob("*.json"):
        assert not re.search(r'"/\w', path.read_text()), path


def test_the_readmes_picture(script, tmp_path):
    logs = ROOT / "logs_certification/digits/0Gaussian"
    code, _, err = script("studies/overview.py", logs / "gaussian-1-head/seed-666", "--output", "overview.svg")
    assert code == 0, err
    drawn = (tmp_path / "overview.svg").read_text()
    assert "<!-- teaching in a ring (training only) -->" in drawn and "<!-- 1 head -->" in drawn
