"""The page, in a browser where there is one."""

import html
import json
import re
import shutil

import pytest
from children import run
from conftest import EXCERPTS, beside, random_log, with_config

from spacte.logs.counts import read_counts
from spacte.logs.table import markdown
from spacte.report import page
from spacte.report.comparison import compare
from spacte.report.reading import ReadOptions, read_runs
from spacte.report.recount import recertify
from spacte.report.table import reached_radii, summary

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
title("summary", "ACR").click(); seen.falling = texts("summary", acr).map(text => text.slice(0, 5));
title("summary", "ACR").click(); seen.rising = texts("summary", acr).map(text => text.slice(0, 5));
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
const first = rows("images")[0];
first.click(); seen.opened = first.nextSibling.textContent; seen.expanded = first.getAttribute("aria-expanded");
first.click(); seen.closed = first.nextSibling.className;
seen.keys = [...document.querySelectorAll("#images th")].map(title => title.textContent);
seen.legend = document.querySelectorAll("#legend li").length;
seen.comparisons = document.querySelectorAll("#comparisons tbody tr").length;
seen.order = [...document.body.children].map(one => one.id || one.querySelector("table")?.id).filter(Boolean);
seen.wide = document.documentElement.scrollWidth;
seen.configurations = document.querySelectorAll("#configurations details").length;
seen.svg = document.querySelectorAll("svg path").length;
seen.requests = performance.getEntriesByType("resource").length;
seen.problems = problems;
document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(seen)}));
</script></body>
"""
ROWS = """
<script>
const rows = table => document.querySelectorAll(`#${table} tbody tr`).length;
const seen = {problems, summary: rows("summary"), images: rows("images")};
document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(seen)}));
</script></body>
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


def seen_in_a_browser(tmp_path, text, script, width=1400):
    """What a script at the end of a page has written into #probe."""
    (tmp_path / "probed.html").write_text(text.replace("<head>", "<head>" + PROBE).replace("</body>", script))
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
    ]
    command += ["--dump-dom", f"file://{tmp_path / 'probed.html'}"]
    dom = run(command, timeout=120).stdout
    return json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1]))


@in_a_browser
@pytest.mark.parametrize("width", [1400, 500])  # headless Chromium is no narrower
def test_the_page_sorts_filters_and_opens_in_a_browser(tmp_path, width):
    runs = read_runs([EXCERPTS])
    table, comparisons = summary(runs, reached_radii(runs)), [compare(runs[0], runs[1]), compare(runs[2], runs[1])]
    text = page.html([[run] for run in runs], table, comparisons)
    assert not re.search(r"""(src|href)=["'](?!#)""", text.replace('xlink:href="#', ""))  # nothing from elsewhere
    seen = seen_in_a_browser(tmp_path, text, CLICKS, width)

    logs = [run.log.set_index("idx") for run in runs]
    idx = logs[0].index.tolist()
    assert seen["problems"] == [] and seen["requests"] == 0
    assert seen["falling"] == ["0.743", "0.715", "0.615"] and seen["rising"] == seen["falling"][::-1]
    assert seen["defences"] == ["Gaussian", "Gaussian", "SmoothMix"] and {"0.743 ± 0.063", "0.960"} <= set(seen["best"])
    assert seen["all"] == [str(i) for i in idx] and seen["idxFalling"] == seen["all"][::-1]

    def chosen(accept, runs=logs):
        return [str(i) for i in idx if any(accept(log.loc[i]) for log in runs)]

    assert seen["abstained"] == chosen(lambda row: row["predict"] == -1)
    assert seen["abstainedFirst"] == chosen(lambda row: row["predict"] == -1, logs[:1]) != seen["abstained"]
    assert seen["wrong"] == chosen(lambda row: row["predict"] not in (-1, row["label"])) != []
    assert seen["klass"] == chosen(lambda row: row["label"] == 8)
    assert seen["count"] == f"{len(seen['klass'])} of 25 images"
    assert seen["configurations"] == 3 and seen["svg"] > 10
    assert seen["keys"] == ["idx", "class", "A", "B", "C"] and seen["legend"] == 3 and seen["comparisons"] == 2
    assert seen["order"].index("curves") < seen["order"].index("summary") < seen["order"].index("images")
    assert seen["expanded"] == "true" and seen["closed"] == "opens" and seen["wide"] <= width
    last = logs[0].index.max()  # idx falls at that time
    assert f"{logs[0].loc[last, 'radius']:.3f}" in seen["opened"]


@in_a_browser
def test_a_page_without_standard_errors_is_whole_in_a_browser(tmp_path):
    """Of a run that has certified one image."""
    text = page_of(read_runs([random_log(tmp_path / "a.log", 1, 0)]))
    assert "SE" not in data_of(text)["table"]["columns"]
    assert seen_in_a_browser(tmp_path, text, ROWS) == {"problems": [], "summary": 1, "images": 1}


def page_of(runs):
    return page.html([[run] for run in runs], summary(runs, [0.5]), [])


def data_of(text):
    """The data of a page."""
    return json.loads(re.search(r"const data = (.*);", text)[1])


def test_the_page_marks_the_best_of_each_group(tmp_path):
    """Of two runs on other images neither is better: no cell is marked, and the page says which group a row is of."""
    logs = [random_log(tmp_path / f"{name}.log", images, 0) for name, images in (("a", 10), ("b", 12))]
    table = data_of(page_of(read_runs(logs)))["table"]
    assert not any(map(any, table["best"])) and all(len(row) == len(table["columns"]) for row in table["best"])
    assert [row[table["columns"].index("group")] for row in table["rows"]] == [1, 2]


def test_the_page_says_at_the_top_what_all_rows_share(tmp_path):
    data = data_of(page_of(read_runs([EXCERPTS])))
    assert data["heading"]["title"] == "CIFAR10, sigma 0.25, 1"
    assert data["heading"]["facts"] == ["CIFAR10", "R110", "sigma 0.25, 1", "radii in L2", "images 25 (one in 20)"]
    assert data["table"]["columns"] == ["run", "defence", "sigma", "abstained", "clean", "ACR", "SE", "0.5"]


def test_the_page_holds_no_path_of_the_machine(tmp_path):
    """Labels in the place of paths; of a classifier's file the name alone."""
    log = random_log(tmp_path / "a" / "x.log", 10, 0)
    with_config(log, classifier=f"{tmp_path}/my.py", classifier_args={"weights": f"{tmp_path}/w.pt", "depth": 3})
    random_log(tmp_path / "b" / "x.log", 10, 1)
    text = page_of(read_runs([tmp_path]))
    data = data_of(text)
    assert str(tmp_path.parent) not in text
    assert {row["label"] for row in data["rows"]} == {"a", "b"} and {row["name"] for row in data["rows"]} == {"x"}
    (config,) = [run["config"] for run in data["runs"] if run["config"]]
    assert (config["classifier"], config["classifier_args"]) == ("my.py", {"weights": "w.pt", "depth": 3})


def test_the_page_holds_any_text(tmp_path):
    """A folder's name that would end the script, and an image that one run has not."""
    logs = [random_log(tmp_path / "<script>alert(1)" / "a.log", 10, 0), random_log(tmp_path / "b.log", 12, 1)]
    runs = read_runs(logs)
    text = page_of(runs)
    data = data_of(text)
    assert "<script>alert" not in text and text.count("</script>") == 1
    assert len(data["images"]) == 12 and data["images"][11][2:].count(None) == 1
    assert markdown(summary(runs, [0.5]))  # a summary is a plain table, too


def test_the_page_holds_votes_and_both_radii(certify, tmp_path):
    log = certify("a", "--max", 100)
    data = data_of(page_of(read_runs([log], ReadOptions(heads=True))))
    counts, papers = read_counts(beside(log, "-counts.jsonl")), read_runs([log])[0].log
    ours = recertify(read_runs([log])[0], "all-votes").log
    for row, one, radius, other in zip(data["images"], counts, papers["radius"], ours["radius"], strict=True):
        ensemble, head = row[2], row[3]
        assert ensemble[1] == radius and ensemble[2] == [radius, other]
        assert ensemble[3][0] == [int(one.estimation[-1].argmax()), int(one.estimation[-1].max())]
        assert head[3][0] == [int(one.estimation[0].argmax()), int(one.estimation[0].max())]


def test_the_keys_of_many_rows():
    keys = page._keys(703)
    assert keys[:2] == ["A", "B"] and keys[25:28] == ["Z", "AA", "AB"] and keys[-1] == "AAA" and len(set(keys)) == 703
