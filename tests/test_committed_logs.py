"""What lies in logs_certification: rows that their votes give, and README's picture made from them."""

import functools
import re

import numpy as np
import pytest
from conftest import ROOT

from spacte.report import comparison
from spacte.report.comparison import compare, compare_experiments
from spacte.report.intervals import holm
from spacte.report.reading import ReadOptions, read_runs
from spacte.report.recount import recertify
from spacte.smooth.certificates import CERTIFICATES

QUEUES = sorted(path for path in (ROOT / "logs_certification").iterdir() if path.is_dir())


@pytest.mark.parametrize("queue", QUEUES, ids=lambda path: path.name)
def test_every_committed_log_is_what_its_votes_give(queue):
    columns = ["idx", "label", "predict", "radius", "correct"]
    runs = read_runs([queue])
    assert len(runs) == len([log for log in queue.rglob("certify-mhead/*.log") if "ACR" not in log.name])
    for run in runs:
        assert recertify(run, run.certificate).log[columns].equals(run.log[columns]), run.path
        summary = run.path.with_name(run.path.stem + "-ACR.log").read_text()
        assert "| cohen " in summary and "| all-votes " in summary


# What the rows of the pages' verdicts compare, by the beginning of a row: the first less the second.
CLAIMS = {
    "five heads beat one network": "5-heads 1-head",
    "five heads match five networks": "5-heads 5-networks",
    "teaching beats no teaching": "5-heads 5-heads-no-teaching",
    "the cosine constraint helps": "5-heads 5-heads-no-cosine",
}
MORE_CLAIMS = {
    "(five networks beat one: ACR)": "5-networks 1-head",
    "(five heads without teaching beat one network: ACR)": "5-heads-no-teaching 1-head",
    "(five heads without it beat one network: ACR)": "5-heads-no-cosine 1-head",
}
VERDICTS = {
    "cifar10": {f"{claim}: ACR": pair for claim, pair in CLAIMS.items()} | MORE_CLAIMS,
    "digits-claims": CLAIMS,
    "digits-heads": {
        "does the ring add anything over self-pacing?": "5-heads 5-heads-self",
        "do heads add anything over one head?": "5-heads 1-head",
        "over one self-paced head": "5-heads 1-head-self",
        "at equal cost?": "2-networks 5-heads",
        "do heads add anything without teaching?": "5-heads-whole 1-head",
        "does teaching add to them?": "5-heads 5-heads-whole",
        "do five teachers help five heads?": "5-heads-teachers 5-heads-whole",
        "| two networks, five heads with five teachers": "2-networks 5-heads-teachers",
        "one head with the mean of five teachers": "1-head-teachers 1-head",
        "does `--pace_share 0.8` help five heads?": "5-heads-share 5-heads",
        "heads without a common training": "5-heads-on-a-trunk 5-heads",
        "an ensemble without a shared trunk": "5-networks 5-heads",
    },
    "cifar10-heads": {
        "does the ring add anything over self-pacing?": "5-heads 5-heads-self",
        "does pacing one head add anything?": "1-head-self 1-head",
        "do heads add anything over one head?": "5-heads 1-head",
        "over one self-paced head": "5-heads 1-head-self",
        "what does the whole gradient add?": "5-heads-self-whole 5-heads-self",
        "| these, five without it and without the cosine term": "5-heads-self-whole 5-heads-self-no-cosine",
        "| five taught heads with it, without": "5-heads-ring-whole 5-heads",
        "| five taught heads, five self-paced ones, both with it": "5-heads-ring-whole 5-heads-self-whole",
        "| five self-paced heads with it, one self-paced head": "5-heads-self-whole 1-head-self",
        "does the cosine term hold heads back?": "5-heads-self-no-cosine 5-heads-self",
        "at equal cost?": "2-networks 5-heads",
        "| one self-paced R14 (26.6 M), five taught heads": "1-head-R14-self 5-heads",
        "| one self-paced R14, five self-paced heads": "1-head-R14-self 5-heads-self-whole",
        "| one self-paced R14, two self-paced networks": "1-head-R14-self 2-networks-self",
        "| two networks, one self-paced head": "2-networks 1-head-self",
        "an ensemble without a shared trunk?": "5-networks 5-heads",
        "| five self-paced networks, five self-paced heads": "5-networks-self 5-heads-self-whole",
        "heads trained one by one on one trained trunk?": "5-heads-on-a-trunk 1-head",
        "| five networks, these five heads": "5-networks 5-heads-on-a-trunk",
        "what do teachers add?": "5-heads-self-teachers 5-heads-self-whole",
        "| with teachers, one self-paced head": "5-heads-self-teachers 1-head-self",
        "| one self-paced R14, with teachers": "1-head-R14-self 5-heads-self-teachers",
        "| with teachers none of which gives a class up": "5-heads-self-sound-teachers 5-heads-self-teachers",
        "| with such teachers, without teachers": "5-heads-self-sound-teachers 5-heads-self-whole",
        "| one self-paced R14, with such teachers": "1-head-R14-self 5-heads-self-sound-teachers",
        "| with such teachers, five taught heads": "5-heads-self-sound-teachers 5-heads",
        "| with such teachers, these five networks": "5-heads-self-sound-teachers 5-networks-self-sound",
        "what do they add to one deeper head?": "1-head-R14-self-sound-teachers 1-head-R14-self",
        "| one self-paced R14, five heads": "1-head-R14-self-sound-teachers 5-heads-self-sound-teachers",
        "| such an R14, two self-paced networks": "1-head-R14-self-sound-teachers 2-networks-self",
        "| such an R14, these five networks": "1-head-R14-self-sound-teachers 5-networks-self-sound",
        "a stronger base instead?": "../3SmoothAdv/smoothadv 1-head",
        "| one SmoothAdv head, the R14 with such teachers": "../3SmoothAdv/smoothadv 1-head-R14-self-sound-teachers",
        "| one CAT-RS head, one head": "../5CATRS/catrs 1-head",
        "| one ACR-weakness head, one head": "../6ACRWeakness/acrweakness 1-head",
    },
}


@functools.cache
def runs(page, name, certificate):
    """The runs of an experiment, read once for all the rows that it is in."""
    return read_runs([ROOT / "logs_certification" / page / "0Gaussian" / name], ReadOptions(certificate=certificate))


@pytest.mark.parametrize(("page", "row"), [(page, row) for page, rows in VERDICTS.items() for row in rows])
def test_a_verdicts_figures_are_what_report_compares(page, row):
    """The ACR's difference and interval under each certificate that the row has a cell of."""
    lines = (ROOT / "logs_certification" / page / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row}")]
    told = re.findall(r"([+-]?0\.\d{3}) \((-?0\.\d{3}) to (-?0\.\d{3})\)", line)
    assert 1 <= len(told) <= 2
    for certificate, cell in zip(CERTIFICATES, told, strict=False):
        a, b = (runs(page, name, certificate) for name in VERDICTS[page][row].split())
        table = (compare(*a, *b) if len(a) == len(b) == 1 else compare_experiments(a, b)).table
        found = table.loc[table["figure"] == "ACR", ["difference", "low", "high"]].to_numpy()[0]
        assert found == pytest.approx([float(number) for number in cell], abs=0.0006), found


@pytest.mark.parametrize("page", ["digits-heads", "cifar10-heads"])
def test_a_verdicts_p_is_adjusted_for_the_rows_of_its_table(page, monkeypatch):
    monkeypatch.setattr(comparison, "holm", lambda p: p)
    lines, told, found = (ROOT / "logs_certification" / page / "README.md").read_text().splitlines(), [], []
    for row, pair in VERDICTS[page].items():
        (line,) = [line for line in lines if line.startswith(f"| {row}")]
        told.append(float(line.split(" | ")[3].replace("< 0.001", "0.0005")))
        a, b = (runs(page, name, "cohen") for name in pair.split())
        found.append(compare_experiments(a, b, [1.0]).table["p_holm"][0])
    assert told == pytest.approx(holm(np.array(found)), abs=0.0006)


def test_no_configuration_names_a_machines_folders():
    for path in (ROOT / "logs_certification").rglob("*.json"):
        assert not re.search(r'"/\w', path.read_text()), path


def test_the_readmes_picture(script, tmp_path):
    logs = ROOT / "logs_certification/digits/0Gaussian"
    code, _, err = script("studies/overview.py", logs / "gaussian-1-head/seed-666", "--output", "overview.svg")
    assert code == 0, err
    drawn = (tmp_path / "overview.svg").read_text()
    assert "<!-- teaching in a ring (training only) -->" in drawn and "<!-- 1 head -->" in drawn
