"""Reading logs: tables, comparisons, pictures, the page, and what is refused."""

import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TINY

from spacte import certlog, page
from spacte.comparison import _named, compare
from spacte.report import labels, markdown, reached_radii, read_runs, render, summary, table_radii

EXCERPTS = Path(__file__).parent / "golden" / "logs"  # 25 images of three of the authors' logs
# Counted by hand (awk) in the excerpts, in the table's order: abstained, ACR, its standard error, images certified at
# 0, 0.25, 0.5, ...
EXPECTED = [
    ("Gaussian", 0.25, 1, 0.614972, 0.064301, [24, 21, 17, 11]),
    ("SmoothMix", 0.25, 0, 0.742800, 0.062572, [23, 22, 20, 17]),
    ("Gaussian", 1.0, 8, 0.714640, 0.176669, [15, 13, 13, 9, 7, 6, 5, 5, 3, 3, 2, 1]),
]


def make_log(path: Path, rows, header=certlog.HEADER) -> Path:
    """A log of (idx, label, predict, radius)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "".join(certlog.format_row(*row, 1.0) for row in rows))
    return path


def random_log(path: Path, images: int, seed: int, shift=0.0) -> Path:
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(0, 4, images)  # the same images in every log
    predict = np.where(rng.random(images) < 0.8, labels, (labels + 1) % 4)
    predict = np.where(rng.random(images) < 0.1, -1, predict)
    radius = np.where(predict < 0, 0, rng.uniform(0, 1, images) + shift)
    return make_log(path, zip(range(images), labels.tolist(), predict.tolist(), radius.tolist(), strict=True))


def test_the_excerpts_give_the_expected_table():
    runs = read_runs([EXCERPTS])
    radii = reached_radii(runs)
    table = summary(runs, radii)
    assert radii.tolist() == [0.25 * k for k in range(1, 12)]
    for row, (defence, sigma, abstained, acr, error, certified) in zip(table.to_dict("records"), EXPECTED, strict=True):
        assert (row["defence"], row["dataset"], row["arch"], row["heads"]) == (defence, "CIFAR10", "R110", "5")
        assert row["sigma"] == sigma and row["images"] == 25 and row["abstained"] == abstained / 25
        assert row["ACR"] == pytest.approx(acr, abs=1e-6) and row["SE"] == pytest.approx(error, abs=1e-6)
        found = [row["clean"], *(row[f"{radius:g}"] for radius in radii)]
        assert found == [(certified[k] if k < len(certified) else 0) / 25 for k in range(12)]


def test_the_table_as_text(script):
    code, out, _ = script("report.py", EXCERPTS)
    assert code == 0
    header, _, *rows = out.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][:10] == [
        "defence", "dataset", "arch", "heads", "sigma", "images", "abstained", "clean", "ACR", "0.25",
    ]  # fmt: skip
    assert "**0.743 ± 0.063**" in rows[1] and "**0.960**" in rows[0] and "**0.000**" in rows[1]  # abstains least
    assert len(rows) == 3 and out.count("**") == 2 * (3 + 3 + 8)


def test_other_formats(script):
    radii = ("--radii", 0.3, 0.1)
    _, out, _ = script("report.py", EXCERPTS, *radii, "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    assert list(table)[-3:] == ["0.3", "0.1", "run"] and table["ACR"][0] == pytest.approx(0.614972, abs=1e-6)
    _, out, _ = script(
        "report.py", EXCERPTS, *radii, "--format", "json", "--compare", *sorted(EXCERPTS.rglob("*25/*/*.log"))
    )
    content = json.loads(out)
    assert [row["defence"] for row in content["logs"]] == [row[0] for row in EXPECTED]
    assert content["comparisons"][0]["images"] == 25
    _, out, _ = script("report.py", EXCERPTS, *radii, "--format", "latex")
    assert all(rule in out for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\textbf{0.743 $\pm$ 0.063}"))


def test_signs_that_latex_would_read():
    runs = [*read_runs([EXCERPTS])]
    table = summary(runs, [0.25]).assign(run="a_b & 50%")
    assert r"a\_b \& 50\%" in render(table, "latex")


def test_a_comparison_for_latex(script, tmp_path):
    for name in ("a_b", "c_d"):
        random_log(tmp_path / f"{name}.log", 10, 0)
    code, out, _ = script("report.py", "--compare", tmp_path / "a_b.log", tmp_path / "c_d.log", "--format", "latex")
    table = [line for line in out.splitlines() if not line.startswith("%")]
    assert code == 0 and table[0].startswith(r"\begin{tabular}") and r"figure & a\_b & c\_d" in table[2]


def test_the_envelope_is_the_best_over_sigma(script):
    code, out, _ = script("report.py", EXCERPTS, "--envelope", "--format", "json", "--radii", 0.5, 0.75, 1)
    rows = [row for row in json.loads(out)["logs"] if row["run"] == "best over sigma"]
    assert code == 0 and [row["defence"] for row in rows] == ["Gaussian"]  # the other has one sigma only
    assert [rows[0][radius] for radius in ("0.5", "0.75", "1")] == [17 / 25, 11 / 25, 7 / 25]
    assert rows[0]["ACR"] is None and rows[0]["sigma"] is None and rows[0]["images"] == 25


def test_an_envelope_of_two_runs_at_one_sigma_is_refused(script, tmp_path):
    for name in ("a", "b"):
        random_log(tmp_path / "1Mine" / "noise-0.25" / f"h-5-{name}.log", 10, 0)
        random_log(tmp_path / "2Yours" / f"h-5-{name}.log", 10, 0)
    code, _, err = script("report.py", tmp_path / "1Mine", "--envelope")
    assert code == 2 and "'h-5-a' and 'h-5-b' are one method at one sigma" in err
    code, _, err = script("report.py", tmp_path / "2Yours", "--envelope")
    assert code == 2 and "the sigma of 'h-5-a' is not known" in err


def test_a_configuration_says_more_than_the_path(tmp_path):
    log = random_log(tmp_path / "0Gaussian/noise-0.25/CIFAR10-R110/h-5-x-certify-skip-2.log", 10, 0)
    config = {
        "dataset": "digits",
        "arch": "R8+R14",
        "num_heads": [1, 1],
        "noise_sd": 0.5,
        "head": None,
        "defence": "Own",
    }
    log.with_suffix(".json").write_text(json.dumps({"config": config, "about": {}}))
    (run,) = read_runs([log])
    assert (run.name, run.defence, run.dataset, run.arch, run.heads, run.sigma) == (
        "h-5-x", "Own", "digits", "R8+R14", "1+1", 0.5,
    )  # fmt: skip
    log.with_suffix(".json").write_text(json.dumps({"of": "another program"}))
    with pytest.warns(UserWarning, match="no configuration of ours"):
        (run,) = read_runs([log])
    assert (run.defence, run.dataset, run.arch, run.heads, run.sigma) == ("Gaussian", "CIFAR10", "R110", "5", 0.25)


def test_nothing_is_known_of_a_bare_log(tmp_path):
    (run,) = read_runs([random_log(tmp_path / "sigma_0.12", 10, 0)])
    assert (run.defence, run.dataset, run.arch, run.heads, run.sigma) == (None, None, None, None, 0.12)
    table = summary([run], [0.5])
    assert "defence" not in render(table, "markdown") and labels([run]) == ["sigma 0.12"]


def test_names_tell_runs_apart(tmp_path):
    logs = [random_log(tmp_path / place / "noise-0.25" / "run.log", 10, seed) for seed, place in enumerate("ab")]
    assert [run.name for run in read_runs(logs)] == ["run (a)", "run (b)"]
    assert labels(read_runs(logs)) == ["sigma 0.25 (a)", "sigma 0.25 (b)"]
    assert labels(read_runs([EXCERPTS]))[0] == "Gaussian, 5 heads, sigma 0.25"


def test_the_data_set_chooses_the_radii():
    assert table_radii(1.1, "ImageNet").tolist() == [0, 0.5, 1.0]
    assert table_radii(0.6, "CIFAR10").tolist() == [0, 0.25, 0.5]


# --- comparisons ---


def runs_of(tmp_path, *logs):
    by_path = {run.path: run for run in read_runs(list(logs))}
    return [by_path[log] for log in logs]


def test_a_paired_difference_and_its_interval(tmp_path):
    """On 2,000 images the bootstrap interval is the normal one, mean +- 1.96 standard errors, to within 6 %."""
    logs = [
        random_log(tmp_path / f"{name}.log", 2000, seed, shift)
        for seed, (name, shift) in enumerate([("a", 0.2), ("b", 0)])
    ]
    a, b = runs_of(tmp_path, *logs)
    found = compare(a, b, [0.5])
    each = certlog.certified_radius(a.log) - certlog.certified_radius(b.log)
    acr = found.table.iloc[0]
    half = 1.96 * each.std(ddof=1) / 2000**0.5
    assert acr["difference"] == pytest.approx(each.mean(), abs=1e-12)
    assert acr["high"] - acr["difference"] == pytest.approx(half, rel=0.06)
    assert acr["difference"] - acr["low"] == pytest.approx(half, rel=0.06)
    assert found.table["figure"].tolist() == ["ACR", "clean", "0.5"]
    share = certlog.certified_accuracy(a.log, [0.5]) - certlog.certified_accuracy(b.log, [0.5])
    assert found.table.iloc[2]["difference"] == pytest.approx(share[0], abs=1e-12)
    text = f"is higher by {acr['difference']:.3f} than that of 'b', 95 % interval {acr['low']:.3f} to {acr['high']:.3f}"
    assert text in found.sentences() and found.sentences().endswith("on the same 2000 images.")
    assert "is lower by" in compare(b, a, [0.5]).sentences()


def test_pairing_sees_what_two_separate_errors_would_hide(tmp_path):
    """A log that is another plus 0.01 on every right image differs from it, though both errors are far larger."""
    log = random_log(tmp_path / "a.log", 300, 0)
    table = certlog.read_log(log)
    rows = zip(table["idx"], table["label"], table["predict"], table["radius"] + 0.01, strict=True)
    a, b = runs_of(tmp_path, make_log(tmp_path / "b.log", rows), log)
    assert compare(a, b).table.iloc[0]["low"] > 0 and certlog.acr_standard_error(a.log) > 0.015


def test_equal_logs_do_not_differ(tmp_path):
    a, b = runs_of(tmp_path, random_log(tmp_path / "a.log", 50, 0), random_log(tmp_path / "b.log", 50, 0))
    found = compare(a, b)
    assert (found.table[["difference", "low", "high"]] == 0).all(axis=None)
    assert "do not differ measurably" in found.sentences()


def test_images_that_do_not_match_are_counted_and_named(tmp_path, script):
    rows = [(idx, 1, 1, 0.5) for idx in range(0, 100, 5)]
    a = make_log(tmp_path / "a.log", [*rows, (7, 1, 1, 0.9)])
    b = make_log(tmp_path / "b.log", rows[4:])
    code, out, _ = script("report.py", "--compare", a, b)
    assert code == 0 and "on the same 16 images" in out
    assert "Left out, only in 'a': 5 images, idx 0, 5, 7, 10, 15." in out
    c = make_log(tmp_path / "c.log", [(3, 1, 1, 0.5)])
    code, _, err = script("report.py", "--compare", a, c)
    assert code == 2 and "fewer than 2 images in common" in err


def test_idx_are_abbreviated_without_a_gap():
    assert _named([0, 1, 2, 3, 4, 7, 20, 40, 60, 80, 81]) == "0-4, 7, 20, 40, ..., 80, 81"
    assert _named([5]) == "5" and _named([1, 2, 4]) == "1, 2, 4"


def test_each_log_against_a_baseline(script):
    (baseline,) = EXCERPTS.glob("0Gaussian/noise-0.25/*/*.log")
    code, out, _ = script("report.py", EXCERPTS, "--baseline", baseline)
    assert code == 0 and out.count("The ACR") == 2 and out.count("| ACR ") == 2
    assert out.count("'Gaussian, 5 heads, sigma 0.25'") == 2
    code, out, err = script("report.py", EXCERPTS, "--baseline", baseline, "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    assert code == 0 and err.count("The ACR") == 2 and len(table["a"].unique()) == 2
    assert set(table["b"]) == {"Gaussian, 5 heads, sigma 0.25"} and set(table["images"]) == {25}


def test_heads_alone_are_compared_with_a_baseline(script, digits_models, certify):
    five, one = certify("a"), certify("b", models=digits_models[1:])
    code, out, _ = script("report.py", five, "--heads", "--baseline", one, "--format", "json")
    names = [each["a"] for each in json.loads(out)["comparisons"]]
    assert code == 0 and len(set(names)) == 4 and sum("head " in name for name in names) == 3


def test_heads_alone_need_the_counts_of_the_log(script, certify):
    log = certify("a")
    counts = log.with_name(log.name.replace(".log", "-counts.jsonl"))
    lines = counts.read_text().splitlines(keepends=True)
    counts.write_text("".join(lines[1:]))
    code, _, err = script("report.py", log, "--heads")
    assert code == 2 and "holds other images than" in err
    counts.unlink()
    code, out, err = script("report.py", log, "--heads", "--format", "json")
    assert code == 0 and len(json.loads(out)["logs"]) == 1 and "no vote counts lie beside" in err


def test_certifications_that_were_made_differently_say_so(tmp_path):
    logs = [random_log(tmp_path / f"{name}.log", 20, 0) for name in "ab"]
    config = {"dataset": "digits", "arch": "R8", "num_heads": [1], "noise_sd": 0.5, "head": None, "alpha": 0.001}
    for log, n in zip(logs, (1000, 100_000), strict=True):
        log.with_suffix(".json").write_text(json.dumps({"config": config | {"N": n}, "about": {}}))
    assert compare(*runs_of(tmp_path, *logs)).sentences().endswith("certified differently: N 1000 and 100000.")


# --- what is refused ---

ROW = "0\t3\t3\t0.5\t1\t0:00:01\n"
BROKEN = [
    ("", "is empty"),
    (certlog.HEADER, "without a row"),
    ("idx\tlabel\tpredict\ttime\n0\t1\t1\t0:00:01\n", "line 1: this is no certification log: it has no column radius"),
    (certlog.HEADER + ROW + ROW, "line 3: idx 0 was there before"),
    (certlog.HEADER + ROW + "1\t3\t3\tnan\t1\t0:00:01\n", "line 3: radius 'nan' must be a number of at least 0"),
    (certlog.HEADER + ROW + "1\t3\t3\t-0.5\t1\t0:00:01\n", "line 3: radius '-0.5' must be"),
    (certlog.HEADER + "0\t3\t3\tfar\t1\t0:00:01\n" + ROW, "line 2: radius 'far' must be"),
    (certlog.HEADER + "0\t3.5\t3\t0.5\t1\t0:00:01\n", "line 2: label '3.5' must be an integer"),
    (certlog.HEADER + "0\t3\t3\t0.5\t2\t0:00:01\n", "line 2: correct '2' must be 0 or 1"),
    (certlog.HEADER + "0\t3\t-2\t0.5\t0\t0:00:01\n", "line 2: predict '-2' must be"),
    (certlog.HEADER + "0\t3\n" + ROW, "line 2: predict '' must be"),
    (certlog.HEADER + ROW + "1\t3\t3\t0.5\t1\t0:00:01\t7\t8\n", "line 3"),
    (certlog.HEADER + ROW + "1\t3\t-1\t0.5\t1\t0:00:01\n", "line 3: correct contradicts label and predict"),
    (certlog.HEADER + ROW + "\n" + ROW, "line 3: idx '' must be"),
    (certlog.HEADER + "0\t3\t3\t1e9\t1\t0:00:01\n", "more than 100 columns: give --radii"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_what_is_no_log_is_named_with_its_line(script, tmp_path, content, message):
    (tmp_path / "x.log").write_text(content)
    code, out, err = script("report.py", "x.log")
    assert code == 2 and not out and err.count("\n") == 1
    assert message in err and ("'x.log'" in err or "columns" in err)


@pytest.mark.parametrize("last", ["2\t3\t3\t0.4", "2", "2\t3\t3\t0.4\n"])
def test_a_line_that_was_cut_short_is_dropped_with_a_warning(script, tmp_path, last):
    (tmp_path / "x.log").write_text(certlog.HEADER + ROW + "1\t3\t3\t0.5\t1\t0:00:01\n" + last)
    code, out, err = script("report.py", "x.log", "--format", "json")
    assert code == 0 and json.loads(out)["logs"][0]["images"] == 2
    assert err == "report.py: warning: 'x.log', line 4: cut short, dropped\n"


def test_blank_lines_at_the_end_are_nothing(script, tmp_path):
    (tmp_path / "x.log").write_text(certlog.HEADER + ROW + "\n\n")
    code, out, err = script("report.py", "x.log", "--format", "json")
    assert code == 0 and not err and json.loads(out)["logs"][0]["images"] == 1


def test_a_folder_may_hold_more_than_whole_logs(script, tmp_path):
    """A run that has just begun, another program's JSON, a folder called x.log; a log given twice counts once."""
    log = random_log(tmp_path / "a/noise-0.2.5/whole.log", 10, 0)
    (tmp_path / "a/begun.log").write_text(certlog.HEADER)
    (tmp_path / "a/x.log").mkdir()
    for content in ("[1]", '{"config": {"num_heads": 5}, "about": {}}', "\0"):
        log.with_suffix(".json").write_text(content)
        code, out, err = script("report.py", "a", log, "--format", "json")
        assert code == 0 and len(json.loads(out)["logs"]) == 1
        assert err.count("\n") == 2 and "'a/begun.log' has no row yet" in err and "no configuration of ours" in err


def test_two_data_sets_are_refused(script, tmp_path):
    random_log(tmp_path / "CIFAR10/a.log", 10, 0)
    random_log(tmp_path / "MNIST/b.log", 10, 0)
    code, _, err = script("report.py", tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert re.search(r"two data sets in one report: '.*/MNIST/b.log', line 1: about MNIST; '.*a.log', line 1", err)
    make_log(tmp_path / "c/a.log", [(0, 1, 1, 0.5), (9, 3, 3, 0.5)])
    make_log(tmp_path / "c/b.log", [(0, 1, 1, 0.5), (9, 4, 4, 0.5)])
    code, _, err = script("report.py", tmp_path / "c")
    assert code == 2 and re.search(r"'.*b.log', line 3: idx 9 has label 4, but 3 in '.*a.log'", err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to read"),
        (["--curves", "a.png"], "nothing to read"),
        (["--training", "nowhere", "a.png"], "folder 'nowhere' holds no TensorBoard files"),
        (["--training", "nowhere", "a.gif"], "'a.gif' must end in .png, .pdf, .svg"),
        ([EXCERPTS, "--curves", "a.jpg"], "'a.jpg' must end in .png, .pdf, .svg"),
        ([EXCERPTS, "--curves", "nowhere/a.png"], "cannot write 'nowhere/a.png'"),
        ([EXCERPTS, "--html", "nowhere/a.html"], "cannot write 'nowhere/a.html'"),
        (["nowhere.log"], "'nowhere.log' is no certification log"),
        (["."], "folder '.' holds no certification log"),
        (["--compare", EXCERPTS, EXCERPTS], "give two logs"),
        (["--compare", EXCERPTS, next(EXCERPTS.rglob("*.log"))], "give two logs"),
        ([EXCERPTS, "--baseline", EXCERPTS], "give one log"),
        ([EXCERPTS, "--html", "a.log"], "'a.log' must end in .html, .htm"),
        ([EXCERPTS, "--curves", "a.png", "--histogram", "a.png"], "two pictures cannot be written to one file"),
    ],
)
def test_wrong_flags_are_one_line(script, tmp_path, flags, message):
    code, _, err = script("report.py", *flags)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not list(tmp_path.rglob("*"))


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


def test_a_certification_prints_the_reports_table(script, trained):
    code, out, err = script(
        "0Gaussian/certify_mhead.py", "--model_path", trained, "--N", 100, "--skip", 40, "--device", "cpu"
    )
    assert code == 0, err
    log = Path(re.search(r"log: (.*)", out)[1])
    (run,) = read_runs([log])
    row = out.splitlines()[2]
    assert (run.defence, run.dataset, run.arch, run.heads, run.sigma) == ("Gaussian", "digits", "R8", "2", 0.5)
    assert row.startswith("| Gaussian") and f"{certlog.average_certified_radius(run.log):.3f} ± " in row
    assert script("report.py", log, "--radii", 0.25, 0.5, 0.75)[1].splitlines()[2] == row


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
title("summary", "ACR").click(); seen.falling = texts("summary", 9);
title("summary", "ACR").click(); seen.rising = texts("summary", 9);
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
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
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
