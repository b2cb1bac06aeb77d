"""Pictures and the page, the latter in a browser where there is one."""

import html
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from children import run
from conftest import EXCERPTS, TINY, beside, full_disk, make_log, random_log
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_report import with_config
from torch.utils.tensorboard import SummaryWriter

from spacte.logs.certlog import certified_accuracy
from spacte.logs.counts import read_counts
from spacte.logs.table import markdown
from spacte.report import page, plots
from spacte.report.comparable import rows_of
from spacte.report.comparison import compare
from spacte.report.reading import Reading, read_runs
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
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [1400, 500])  # headless Chromium is no narrower
def test_the_page_sorts_filters_and_opens_in_a_browser(tmp_path, width):
    runs = read_runs([EXCERPTS])
    table, comparisons = summary(runs, reached_radii(runs)), [compare(runs[0], runs[1]), compare(runs[2], runs[1])]
    text = page.html([[run] for run in runs], table, comparisons)
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
        f"--window-size={width},900",
    ]
    command += ["--dump-dom", f"file://{tmp_path / 'probed.html'}"]
    dom = run(command, timeout=120).stdout
    seen = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1]))

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
    data = data_of(page_of(read_runs([log], Reading(heads=True))))
    counts, papers = read_counts(beside(log, "-counts.jsonl")), read_runs([log])[0].log
    ours = certified_again(read_runs([log])[0], "all-votes").log
    for row, one, radius, other in zip(data["images"], counts, papers["radius"], ours["radius"], strict=True):
        ensemble, head = row[2], row[3]
        assert ensemble[1] == radius and ensemble[2] == [radius, other]
        assert ensemble[3][0] == [int(one.estimation[-1].argmax()), int(one.estimation[-1].max())]
        assert head[3][0] == [int(one.estimation[0].argmax()), int(one.estimation[0].max())]


def test_the_keys_of_many_rows():
    keys = page._keys(703)
    assert keys[:2] == ["A", "B"] and keys[25:28] == ["Z", "AA", "AB"] and keys[-1] == "AAA" and len(set(keys)) == 703


# --- many runs ---


def seeds(tmp_path, experiments=3, number=7):
    for experiment in range(experiments):
        for seed in range(number):
            random_log(tmp_path / f"way-{experiment}/seed-{seed}/h-5-{experiment}.log", 30, 10 * experiment + seed)
    return read_runs([tmp_path])


def drawn(figure):
    """The figure's size and where its legend and its labels lie, in inches."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    inches = figure.dpi_scale_trans.inverted()
    parts = [figure.legends[0], figure.axes[0].yaxis.label, figure.axes[0].xaxis.label]
    return figure.get_size_inches(), [part.get_window_extent().transformed(inches) for part in parts]


@pytest.mark.parametrize("over_seeds", [False, True])
def test_a_picture_of_many_runs_is_not_clipped(tmp_path, over_seeds):
    """Its height grows with the legend, and the axes keep their room."""
    rows = [some for _, some in rows_of(seeds(tmp_path), over_seeds)]
    figure = plots.curves(rows)
    (width, height), boxes = drawn(figure)
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert figure.axes[0].get_window_extent().height / figure.dpi > 3
    assert len(figure.axes[0].lines) == len(rows) == (3 if over_seeds else 21)


def test_the_seeds_of_an_experiment_are_a_line_with_a_band(tmp_path):
    rows = [some for _, some in rows_of(seeds(tmp_path), over_seeds=True)]
    (axes,) = plots.curves(rows).axes
    line, band = axes.lines[0], axes.collections[0].get_paths()[0].vertices
    each = np.stack([certified_accuracy(run.log, line.get_xdata()) for run in rows[0]])
    assert line.get_ydata() == pytest.approx(each.mean(axis=0)) and line.get_label() == "way-0, 7 runs"
    at_start = band[np.isclose(band[:, 0], 0)][:, 1]
    assert (at_start.min(), at_start.max()) == pytest.approx((each[:, 0].min(), each[:, 0].max()))


def test_the_page_takes_seeds_as_rows(script, tmp_path):
    seeds(tmp_path / "logs")
    code, _, err = script("report.py", "logs", "--over_seeds", "--html", "p.html", "--by_class")
    assert code == 0, err
    data = json.loads(re.search(r"const data = (.*);", (tmp_path / "p.html").read_text())[1])
    assert [(row["key"], row["label"], len(row["runs"])) for row in data["rows"]] == [
        (key, f"way-{number}, 7 runs", 7) for number, key in enumerate("ABC")
    ]
    assert len(data["table"]["rows"]) == 3 and len(data["runs"]) == 21 and len(data["images"][0]) == 2 + 21


# --- the distribution of p ---


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


def test_its_picture_is_the_distribution_function(tmp_path):
    """The share of images with at most p: from the wrong ones at 0 up to 1; of seeds the mean."""
    runs = [in_sigma(run) for run in seeds(tmp_path, experiments=1, number=2)]
    for rows in ([[runs[0]]], [runs]):
        (line,) = plots.probabilities(rows).axes[0].lines
        p = [label_probabilities(run) for run in rows[0]]
        for at in (0.0, 0.7, 1.0):
            x = line.get_xdata()[np.searchsorted(line.get_xdata(), at)]
            expected = np.mean([(one <= x).mean() for one in p])
            assert line.get_ydata()[line.get_xdata() == x] == pytest.approx(expected)
        assert line.get_ydata()[-1] == 1 and (np.diff(line.get_ydata()) >= 0).all()


def in_sigma(run):
    return replace(run, sigma=0.5)


def test_a_folder_may_be_called_anything_in_a_legend(tmp_path):
    names = ["_old", "a$b$", "$\\frac"]
    for number, name in enumerate(names):
        random_log(tmp_path / name / "x.log", 10, number)
    figure = plots.curves([[run] for run in read_runs([tmp_path])])
    FigureCanvasAgg(figure).draw()
    assert sorted(text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()) == sorted(names)


def test_no_name_in_a_picture_is_a_formula(tmp_path):
    """Not a stranger's data set, nor the folder or a figure of a training run: each would be a broken one."""
    run = replace(read_runs([random_log(tmp_path / "a.log", 10, 0)])[0], dataset="$x_y^{")
    with SummaryWriter(tmp_path / "$x_y^{") as events:
        events.add_scalar("$\\frac", 1.0, 1)
    for figure in (plots.curves([[run]]), plots.histogram([run]), plots.training(tmp_path / "$x_y^{")):
        FigureCanvasAgg(figure).draw()


def test_radii_from_all_votes_tell_no_probability(script, tmp_path):
    with_config(random_log(tmp_path / "x.log", 10, 0), certificate="all-votes")
    code, _, err = script("report.py", "x.log", "--ecdf", "e.png")
    assert code == 2 and "has no votes, and its all-votes radii tell no probabilities" in err


@pytest.mark.parametrize("name", ["a.png", "a.pdf", "a.svg", "a.html"])
def test_a_full_disk_is_one_line(script, tmp_path, name):
    with full_disk():
        code, _, err = script("report.py", EXCERPTS, "--html" if name == "a.html" else "--curves", name)
    assert (code, err) == (2, f"report.py: error: cannot write '{name}': File too large\n")
    assert not list(tmp_path.iterdir())


def test_pictures_are_written_once_all_are_there(script, tmp_path):
    log = make_log(tmp_path / "a.log", [(0, 1, 1, 0.5), (1, 1, 1, 0.7)])
    code, out, err = script("report.py", log, "--curves", "a.png", "--ecdf", "b.png")
    assert (
        code == 2
        and out == ""
        and "neither the votes nor the sigma" in err
        and [path.name for path in tmp_path.iterdir()] == ["a.log"]
    )
