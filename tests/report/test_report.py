"""The table of a report, its formats, and the best of its columns."""

import io
import json
import math
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import EXCERPTS, make_log, random_log, with_config

from spacte.logs import certlog
from spacte.logs.description import printable
from spacte.logs.table import csv, markdown, readable, render, table_radii
from spacte.report.reading import read_runs
from spacte.report.table import reached_radii, summary

# Counted by hand (awk) in the excerpts, in the table's order: abstained, ACR, its standard error, images certified at
# 0, 0.25, 0.5, ...
EXPECTED = [
    ("Gaussian", 0.25, 1, 0.614972, 0.064301, [24, 21, 17, 11]),
    ("SmoothMix", 0.25, 0, 0.742800, 0.062572, [23, 22, 20, 17]),
    ("Gaussian", 1.0, 8, 0.714640, 0.176669, [15, 13, 13, 9, 7, 6, 5, 5, 3, 3, 2, 1]),
]


def read_csv(script, *flags):
    code, out, err = script("report.py", *flags, "--format", "csv")
    assert code == 0, err
    return pd.read_csv(io.StringIO(out))


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
    assert "**0.743 ± 0.063**" in rows[1] and "**0.960**" in rows[0]
    assert "|       0.000 |" in rows[1]  # to abstain least is no merit: a wrong answer is no abstention
    assert len(rows) == 3 and out.count("**") == 2 * (3 + 2 + 8)


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


def test_what_a_stranger_has_written_is_text_in_every_format():
    texts = [r"\input{x}", "a|b", "=1+1"]
    table = summary([*read_runs([EXCERPTS])], [0.25]).assign(defence=texts, arch=texts)
    assert r"\input{x}" not in (tex := render(table, "latex")) and r"\textbackslash{}input\{x\}" in tex
    assert render(table, "markdown").count(r"a\|b") == markdown(table).count(r"a\|b") == 2
    assert {"'=1+1", "a|b"} <= set(pd.read_csv(io.StringIO(render(table, "csv")))["defence"])
    assert printable("a\nb\x1b[2J\udcff") == r"a\nb\x1b[2J\udcff"


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


def test_one_network_at_several_sigmas(script, tmp_path):
    """The table says where each was trained; the envelope takes the best of the sigmas, also of two trainings."""
    for trained, sigma, radius in ((0.5, 0.25, 0.4), (0.5, 0.5, 0.9), (0.25, 0.25, 0.6)):
        folder = tmp_path / "0Gaussian" / f"noise-{sigma:.2f}" / f"at-{trained}"
        log = make_log(folder / "h-5-eps-0.8-certify-skip-1.log", [(0, 3, 3, radius), (1, 4, 4, radius / 2)])
        with_config(log, [{"noise_sd": trained, "seed": 1}], noise_sd=sigma)
    code, out, err = script("report.py", tmp_path, "--envelope", "--format", "json", "--radii", 0.25, 0.5)
    assert code == 0, err
    *rows, best = json.loads(out)["logs"]
    assert sorted((row["sigma"], row["trained"]) for row in rows) == [(0.25, 0.25), (0.25, 0.5), (0.5, 0.5)]
    assert best["run"] == "best over sigma" and (best["0.25"], best["0.5"]) == (1.0, 0.5)
    code, out, _ = script("report.py", tmp_path / "0Gaussian" / "noise-0.50")
    assert code == 0 and "trained" not in out.splitlines()[0]


def test_an_envelope_of_two_runs_at_one_sigma_is_refused(script, tmp_path):
    for name in ("a", "b"):
        random_log(tmp_path / "1Mine" / "noise-0.25" / f"h-5-{name}.log", 10, 0)
        random_log(tmp_path / "2Yours" / f"h-5-{name}.log", 10, 0)
    code, _, err = script("report.py", tmp_path / "1Mine", "--envelope")
    assert code == 2 and "'h-5-a' and 'h-5-b' are one method at one sigma" in err
    code, _, err = script("report.py", tmp_path / "2Yours", "--envelope")
    assert code == 2 and "the sigma of 'h-5-a' is not known" in err


def test_one_image_has_no_standard_error(script, tmp_path):
    log = make_log(tmp_path / "x.log", [(0, 1, 1, 0.5)])
    assert math.isnan(certlog.acr_standard_error(certlog.read_log(log)))
    assert "±" not in script("report.py", log)[1]
    assert json.loads(script("report.py", log, "--format", "json")[1])["logs"][0]["SE"] is None
    assert pd.read_csv(io.StringIO(script("report.py", log, "--format", "csv")[1]))["SE"].isna().all()


def test_the_data_set_chooses_the_radii():
    assert table_radii(1.1, "ImageNet").tolist() == [0, 0.5, 1.0]
    assert table_radii(0.6, "CIFAR10").tolist() == [0, 0.25, 0.5]


@pytest.mark.parametrize("trained", [0.25, 1.0])
def test_a_network_at_a_smaller_or_larger_sigma_than_its_own_is_shown_as_such(script, tmp_path, trained):
    log = make_log(tmp_path / "a.log", [(0, 1, 1, 0.5), (1, 1, 1, 0.6)])
    with_config(log, [{"noise_sd": trained}], noise_sd=0.5)
    assert read_csv(script, log)["trained"].tolist() == [trained]


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)"])
def test_a_text_in_csv_is_no_formula_and_a_number_stays_one(text):
    found = pd.read_csv(io.StringIO(csv(pd.DataFrame({"run": [text, "a=b-c"], "difference": [-0.5, 1.0]}))))
    assert found["run"].tolist() == [f"'{text}", "a=b-c"] and found["difference"].tolist() == [-0.5, 1.0]


def test_json_has_every_digit_of_a_figure(script, tmp_path):
    log = random_log(tmp_path / "a.log", 7, 0)
    (row,) = json.loads(script("report.py", log, "--format", "json")[1])["logs"]
    acr = certlog.average_certified_radius(certlog.read_log(log))
    assert row["ACR"] == pytest.approx(acr, abs=1e-14) != round(acr, 10)


def test_draws_are_shown_unless_all_runs_have_the_same():
    table = summary([*read_runs([EXCERPTS])], [0.25])
    for draws, shown in (([1000.0] * 3, False), ([1000.0, 1000.0, 2000.0], True), ([1000.0, 1000.0, math.nan], True)):
        assert ("draws" in readable(table.assign(draws=draws))) == shown


# --- the best of a column ---


def best_acrs(script, *flags):
    """Which rows' ACRs are bold, in a table in the order of the runs' names."""
    code, out, err = script("report.py", *flags)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = header.index("ACR")
    return [row[-1] for row in rows if row[column].startswith("**")]


def four_runs(tmp_path, **fields):
    """Runs a, b, c and d, each better than the one before; c and d differ from a and b in `fields`."""
    for number, name in enumerate("abcd"):
        images = fields.get("images", 10) if number > 1 else 10
        log = make_log(tmp_path / f"{name}.log", [(idx, 1, 1, 0.25 + number / 10) for idx in range(images)])
        with_config(log, **fields if number > 1 else {})


@pytest.mark.parametrize("fields", [{"images": 8}, {"N": 100_000}, {"alpha": 0.01}, {"sequential": {"tolerance": 0.1}}])
def test_the_best_is_of_the_rows_that_were_certified_alike(script, tmp_path, fields):
    four_runs(tmp_path, **fields)
    assert best_acrs(script, tmp_path) == ["b", "d"][: 1 + ("sequential" not in fields)]  # a lower bound is no best
    table = summary(read_runs([tmp_path]), [0.25])
    assert table["group"].tolist() == [1, 1, 2, 2] and "group" in render(table, "markdown")


def test_rows_that_were_certified_alike_have_one_best(script, tmp_path):
    four_runs(tmp_path)
    assert best_acrs(script, tmp_path) == ["d"]
    assert "group" not in script("report.py", tmp_path)[1]


def test_rows_that_read_the_same_have_no_best(script, tmp_path):
    """Their ACRs differ beyond the third decimal."""
    for name, by in (("a", 0.0), ("b", 1e-5)):
        with_config(make_log(tmp_path / f"{name}.log", [(idx, 1, 1, 0.3 + by) for idx in range(10)]))
    assert best_acrs(script, tmp_path) == []


def test_logs_without_a_configuration_are_ranked_among_themselves(script, tmp_path):
    four_runs(tmp_path)
    for name in "cd":
        (tmp_path / f"{name}.json").unlink()
    assert best_acrs(script, tmp_path) == ["d", "b"]  # without a data set, they come first


@pytest.mark.parametrize("style", ["markdown", "latex", "csv", "json"])
def test_a_name_that_is_not_utf8_can_be_printed(script, tmp_path, style):
    for seed, name in enumerate((b"caf\xe9", b"caf\xe8")):
        random_log(tmp_path / os.fsdecode(name) / os.fsdecode(b"run-\xff.log"), 60, seed)
    logs = sorted(tmp_path.rglob("*.log"))
    flags = ("--format", style, "--html", "p.html", "--curves", "c.svg")
    code, out, err = script("report.py", *logs, "--baseline", logs[0], *flags)
    assert code == 0, err
    assert "udce8" in out and "udce9" in out and "?" not in out
    assert "udcff" in (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to read"),
        (["--curves", "a.png"], "nothing to read"),
        (["--training", "nowhere", "a.png"], "folder 'nowhere' holds no TensorBoard files"),
        (["--training", "nowhere", "a.gif"], "'a.gif' must end in .png, .pdf, .svg"),
        ([EXCERPTS, "--curves", "a.jpg"], "'a.jpg' must end in .png, .pdf, .svg"),
        ([EXCERPTS, "--curves", "nowhere/a.png"], "'nowhere/a.png' cannot be written: give a file in a folder that is"),
        ([EXCERPTS, "--curves", "a.png", "--html", "nowhere/a.html"], "'nowhere/a.html' cannot be written"),
        ([EXCERPTS, "--curves", "/dev/null/a.png"], "'/dev/null/a.png' cannot be written"),
        (["nowhere.log"], "'nowhere.log' is not a certification log"),
        (["."], "folder '.' holds no certification log"),
        (["--compare", EXCERPTS, EXCERPTS], "they have a log in common"),
        (["--compare", EXCERPTS, next(EXCERPTS.rglob("*.log"))], "they have a log in common"),
        ([EXCERPTS, "--baseline", EXCERPTS], "give one log"),
        ([EXCERPTS, "--html", "a.log"], "'a.log' must end in .html, .htm"),
        ([EXCERPTS, "--curves", "a.png", "--histogram", "a.png"], "two pictures cannot be written to one file"),
    ],
)
def test_wrong_flags_are_one_line(script, tmp_path, flags, message):
    code, _, err = script("report.py", *flags)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not list(tmp_path.rglob("*"))


def test_a_certification_prints_the_reports_table(script, trained):
    code, out, err = script(
        "0Gaussian/certify_mhead.py", "--model_path", trained, "--N", 100, "--skip", 40, "--device", "cpu"
    )
    assert code == 0, err
    log = Path(re.search(r"log: (.*)", out)[1])
    (run,) = read_runs([log])
    row = out.splitlines()[2]
    assert (run.defence, run.dataset, run.arch, str(run.heads), run.sigma) == ("Gaussian", "digits", "R8", "2", 0.5)
    assert row.startswith("| Gaussian") and f"{certlog.average_certified_radius(run.log):.3f} ± " in row
    assert script("report.py", log, "--radii", 0.25, 0.5, 0.75)[1].splitlines()[2] == row
