"""Pictures and the page, the latter in a browser where there is one."""

import html
import json
import re
import shutil

import numpy as np
import pytest
from children import run
from conftest import EXCERPTS, TINY, beside, make_log, random_log

from spacte.logs.counts import read_counts
from spacte.logs.table import markdown
from spacte.report import page, plots
from spacte.report.comparison import compare
from spacte.report.reading import read_runs
from spacte.report.recount import certified_again, label_probabilities
from spacte.report.table import reached_radii, summary

# --- pictures ---


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_pictures(script, tmp_path, ending, start):
    code, _, err = script("report.py", EXCERPTS, "--curves", f"c.{ending}", "--histogram", f"h.{ending}")
    assert code == 0, err
    assert all((tmp_path / name).read_bytes().startswith(start) for name in (f"c.{ending}", f"h.{ending}"))


def test_a_log_without_a_certificate_can_be_drawn(script, tmp_path):
    make_log(tmp_path / "x.log", [(0, 1, -1, 0.0), (1, 2, 3, 0.5)])
    code, out, err = script("report.py", "x.log", "--curves", "c.png", "--histogram", "h.png", "--html", "p.html")
    assert code == 0 and "0.000" in out, err


def test_a_training_run_can_be_drawn(script, tmp_path):
    assert script("0Gaussian/train.py", *TINY, "--num_heads", 2, "--epochs", 2)[0] == 0
    (events,) = (tmp_path / "runs").rglob("events.out*")
    code, _, err = script("report.py", "--training", events.parent, "t.svg")
    assert code == 0, err
    drawn = (tmp_path / "t.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("loss", "accuracy", "lambda", "acc1", "head0", "epoch"))


# --- the page ---

PROBE = """
<script>window.problems = []; window.onerror = message => problems.push(message);</script>
"""
CLICKS = """
<script>
const rows = table => [...document.querySelectorAll(`#${table} tbody tr`)];
const texts = (table, column) => rows(table).map(row => row.cells[column].textContent);
const title = (table, text) => [...document.querySelectorAll(`#${table} th button`)].find(b => b.textContent === text);
const seen = {};
const acr = [...document.querySelectorAll("#summary th")].findIndex(th => th.textContent === "ACR");
title("summary", "ACR").click(); seen.falling = texts("summary", acr);
title("summary", "ACR").click(); seen.rising = texts("summary", acr);
title("summary", "defence").click(); seen.defences = texts("summary", 1);
seen.best = [...document.querySelectorAll("#summary td.best")].map(cell => cell.textContent);
const form = document.getElementById("filters");
const set = (name, value) => { form.elements[name].value = value; form.onchange(); return texts("images", 0); };
seen.all = texts("images", 0);
seen.abstained = set("result", "abstained");
seen.abstainedFirst = set("run", "0");
seen.wrong = (set("run", ""), set("result", "wrong"));
seen.klass = (set("result", ""), set("class", "8"));
seen.count = document.getElementById("count").textContent;
set("class", "");
title("images", "idx").click(); title("images", "idx").click(); seen.idxFalling = texts("images", 0);
seen.configurations = document.querySelectorAll("#configurations details").length;
seen.svg = document.querySelectorAll("svg path").length;
seen.requests = performance.getEntriesByType("resource").length;
seen.problems = problems;
document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(seen)}));
</script></body>
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_sorts_and_filters_in_a_browser(tmp_path):
    runs = read_runs([EXCERPTS])
    page.write(runs, summary(runs, reached_radii(runs)), [compare(runs[0], runs[1])], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!#)""", text.replace('xlink:href="#', ""))  # nothing from elsewhere
    probed = text.replace("<head>", "<head>" + PROBE).replace("</body>", CLICKS)
    (tmp_path / "probed.html").write_text(probed)
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--dump-dom", f"file://{tmp_path / 'probed.html'}"]
    dom = run(command, timeout=120).stdout
    seen = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1]))

    logs = [run.log.set_index("idx") for run in runs]
    idx = logs[0].index.tolist()
    assert seen["problems"] == [] and seen["requests"] == 0
    assert seen["falling"] == ["0.743", "0.715", "0.615"] and seen["rising"] == seen["falling"][::-1]
    assert seen["defences"] == ["Gaussian", "Gaussian", "SmoothMix"] and {"0.743", "0.960"} <= set(seen["best"])
    assert seen["all"] == [str(i) for i in idx] and seen["idxFalling"] == seen["all"][::-1]

    def chosen(accept, runs=logs):
        return [str(i) for i in idx if any(accept(log.loc[i]) for log in runs)]

    assert seen["abstained"] == chosen(lambda row: row["predict"] == -1)
    assert seen["abstainedFirst"] == chosen(lambda row: row["predict"] == -1, logs[:1]) != seen["abstained"]
    assert seen["wrong"] == chosen(lambda row: row["predict"] not in (-1, row["label"])) != []
    assert seen["klass"] == chosen(lambda row: row["label"] == 8)
    assert seen["count"] == f"{len(seen['klass'])} of 25 images"
    assert seen["configurations"] == 3 and seen["svg"] > 10


def test_the_page_marks_the_best_of_each_group(tmp_path):
    """Of two runs on other images neither is better: no cell is marked, and the page says which group a row is of."""
    logs = [random_log(tmp_path / f"{name}.log", images, 0) for name, images in (("a", 10), ("b", 12))]
    runs = read_runs(logs)
    page.write(runs, summary(runs, [0.5]), [], tmp_path / "p.html")
    table = json.loads(re.search(r"const data = (.*);", (tmp_path / "p.html").read_text())[1])["table"]
    assert not any(map(any, table["best"])) and all(len(row) == len(table["columns"]) for row in table["best"])
    assert [row[table["columns"].index("group")] for row in table["rows"]] == [1, 2]


def test_the_page_says_once_what_all_rows_share(tmp_path):
    runs = read_runs([EXCERPTS])
    page.write(runs, summary(runs, [0.5]), [], tmp_path / "p.html")
    table = json.loads(re.search(r"const data = (.*);", (tmp_path / "p.html").read_text())[1])["table"]
    assert table["shared"] == "dataset CIFAR10, arch R110, heads 5, images 25"
    assert table["columns"] == ["run", "defence", "sigma", "abstained", "clean", "ACR", "SE", "0.5"]


def test_the_page_holds_any_text(tmp_path):
    """A folder's name that would end the script, and an image that one run has not."""
    logs = [random_log(tmp_path / "<script>alert(1)" / "a.log", 10, 0), random_log(tmp_path / "b.log", 12, 1)]
    runs = read_runs(logs)
    page.write(runs, summary(runs, [0.5]), [], tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "<script>alert" not in text and text.count("</script>") == 1
    data = json.loads(re.search(r"const data = (.*);", text)[1])
    assert len(data["images"]) == 12 and data["images"][11][2:].count(None) == 1
    assert markdown(summary(runs, [0.5]))  # a summary is a plain table, too


def test_the_page_holds_votes_and_both_radii(certify, tmp_path):
    log = certify("a", "--max", 100)
    runs = read_runs([log], heads=True)
    page.write(runs, summary(runs, [0.5]), [], tmp_path / "p.html")
    data = json.loads(re.search(r"const data = (.*);", (tmp_path / "p.html").read_text())[1])
    counts, papers = read_counts(beside(log, "-counts.jsonl")), read_runs([log])[0].log
    ours = certified_again(read_runs([log])[0], "all-votes").log
    for row, one, radius, other in zip(data["images"], counts, papers["radius"], ours["radius"], strict=True):
        ensemble, head = row[-1], row[2]
        assert ensemble[1] == radius and ensemble[2] == [radius, other]
        assert ensemble[3][0] == [int(one.estimation[-1].argmax()), int(one.estimation[-1].max())]
        assert head[3][0] == [int(one.estimation[0].argmax()), int(one.estimation[0].max())]


def test_the_distribution_of_p_is_that_of_the_votes_or_of_the_radii(certify, tmp_path):
    log = certify("a", "--max", 100)
    (run,) = read_runs([log])
    votes = [one.estimation[-1][one.label] / 200 for one in read_counts(beside(log, "-counts.jsonl"))]
    assert label_probabilities(run).tolist() == votes
    (run_skipping,) = read_runs([certify("b", "--max", 100, "--skip_wrong")])
    skipping = label_probabilities(run_skipping)
    wrong = run_skipping.log["correct"] == 0
    assert (skipping[~wrong] == np.array(votes)[~wrong]).all() and 0 < skipping[wrong].max() < 1
    beside(log, "-counts.jsonl").unlink()
    bounds = label_probabilities(run)
    assert all(bound <= p and (bound == 0 or bound >= 0.5) for bound, p in zip(bounds, votes, strict=True))
    (line,) = plots.probabilities([run]).axes[0].lines
    assert line.get_xdata()[0] == 0 and line.get_ydata()[-1] == 0
