"""Pictures: of logs, of a training, of many runs, and where runs are seeds, the page."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import EXCERPTS, TINY, beside, full_disk, make_log, random_log, with_config
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.utils.tensorboard import SummaryWriter

from spacte.logs.certlog import certified_accuracy
from spacte.logs.counts import read_counts
from spacte.report import plots
from spacte.report.comparable import rows_of
from spacte.report.reading import read_runs
from spacte.report.recount import label_probabilities

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
    log = certify("a", "--max", 100, skip=3)
    (run,) = read_runs([log])
    votes = [one.estimation[-1][one.label] / 200 for one in read_counts(beside(log, "-counts.jsonl"))]
    assert label_probabilities(run).tolist() == votes
    (run_skipping,) = read_runs([certify("b", "--max", 100, "--skip_wrong", skip=3)])
    skipping = label_probabilities(run_skipping)
    wrong = run_skipping.log["correct"] == 0
    assert (skipping[~wrong] == np.array(votes)[~wrong]).all() and wrong.any() and 0 < skipping[wrong].max() < 1
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
