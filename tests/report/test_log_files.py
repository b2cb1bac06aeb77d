"""What is read from a log, its path and its configuration, and which logs are refused."""

import json
import re

import pytest
from conftest import CONFIG, beside, make_log, random_log, with_config

from spacte.logs import certlog
from spacte.logs.table import render
from spacte.report.labels import labels
from spacte.report.reading import read_runs
from spacte.report.table import summary


def test_the_folder_that_differs_is_the_method_of_logs_of_others(script, tmp_path):
    """As other projects lay their logs out: cifar10/resnet110/<method>/noise_0.25.tsv, a seed after it or not."""
    for method in ("cat-rs", "cohen"):
        for name in ("noise_0.25.tsv", "noise_0.50_7483.tsv"):
            random_log(tmp_path / "cifar10" / "cifar_resnet110" / method / name, 10, len(name))
    code, out, err = script("report.py", tmp_path, "--envelope", "--format", "json", "--radii", 0.5)
    assert code == 0, err
    rows = json.loads(out)["logs"]
    assert {(row["defence"], row["sigma"], row["arch"], row["dataset"]) for row in rows[:4]} == {
        (method, sigma, "R110", "CIFAR10") for method in ("cat-rs", "cohen") for sigma in (0.25, 0.5)
    }
    assert [row["defence"] for row in rows[4:]] == ["cat-rs", "cohen"] and rows[4]["run"] == "best over sigma"
    code, out, _ = script("report.py", tmp_path / "cifar10/cifar_resnet110/cohen", "--format", "json")
    assert [row["defence"] for row in json.loads(out)["logs"]] == [None, None]


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("fmnist/resnet50/sigma_0.5.txt", ("FashionMNIST", "R50", 0.5)),
        ("CIFAR10-R110/noise-1.00/x.log", ("CIFAR10", "R110", 1.0)),
        ("cifar100/ResNet-20/noise_0.12/test/sigma_0.25", ("CIFAR100", "R20", 0.25)),
        ("resnets/noise_high/x.log", (None, None, None)),
    ],
)
def test_what_a_path_says(tmp_path, path, known):
    (run,) = read_runs([random_log(tmp_path / path, 10, 0)])
    assert (run.dataset, run.arch, run.sigma) == known


@pytest.mark.parametrize(("separator", "encoding"), [(",", "utf-8"), ("\t", "utf-16"), (",", "utf-8-sig")])
def test_a_log_that_another_program_has_saved(script, tmp_path, separator, encoding):
    log = random_log(tmp_path / "a" / "x.log", 10, 0)
    copy = tmp_path / "b" / "x.csv"
    copy.parent.mkdir()
    copy.write_text(log.read_text().replace("\t", separator), encoding=encoding)
    assert script("report.py", "b", "--format", "csv")[1] == script("report.py", "a", "--format", "csv")[1]


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
    assert (run.name, run.defence, run.dataset, run.arch, str(run.heads), run.sigma) == (
        "h-5-x", "Own", "digits", "R8+R14", "2 networks", 0.5,
    )  # fmt: skip
    log.with_suffix(".json").write_text(json.dumps({"of": "another program"}))
    with pytest.warns(UserWarning, match="is not a configuration of ours"):
        (run,) = read_runs([log])
    assert (run.defence, run.dataset, run.arch, str(run.heads), run.sigma) == ("Gaussian", "CIFAR10", "R110", "5", 0.25)


@pytest.mark.parametrize("other", [{"classifier": "mine.py:build"}, {"normalize": ["none"]}])
def test_a_classifier_that_was_not_trained_here_has_no_defence_of_a_folders_name(tmp_path, other):
    """A function of the user's, a published checkpoint: certified in a defence's folder, or kept below 2Papers."""
    log = random_log(tmp_path / "1Consistency/logs/x.log", 10, 0)
    assert read_runs([with_config(log)])[0].defence == "Consistency", "an older log of a checkpoint of ours"
    assert read_runs([with_config(log, **other)])[0].defence is None


def test_nothing_is_known_of_a_bare_log(tmp_path):
    (run,) = read_runs([random_log(tmp_path / "sigma_0.12", 10, 0)])
    assert (run.defence, run.dataset, run.arch, run.heads, run.sigma) == (None, None, None, None, 0.12)
    table = summary([run], [0.5])
    assert "defence" not in render(table, "markdown") and labels([[run]]) == ["sigma 0.12"]


# --- what is refused ---

ROW = "0\t3\t3\t0.5\t1\t0:00:01\n"
BROKEN = [
    ("", "is empty"),
    (certlog.HEADER, "without a row"),
    (
        "idx\tlabel\tpredict\ttime\n0\t1\t1\t0:00:01\n",
        "line 1: this is not a certification log: it has no column radius",
    ),
    (certlog.HEADER + ROW + ROW, "line 3: idx 0 occurs twice"),
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
    (certlog.HEADER + ROW + "1e30\t3\t3\t0.5\t1\t0:00:01\n", "line 3: idx '1e30' must be an integer"),
]


def test_any_radius_has_a_table(script, tmp_path):
    """Data of one's own can be in any unit."""
    (tmp_path / "x.log").write_text(certlog.HEADER + "0\t3\t3\t1e9\t1\t0:00:01\n")
    code, out, err = script("report.py", "x.log")
    assert code == 0 and out.count("|", 0, out.index("\n")) < 45, err


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_what_is_no_log_is_named_with_its_line(script, tmp_path, content, message):
    (tmp_path / "x.log").write_text(content)
    code, out, err = script("report.py", "x.log")
    assert code == 2 and not out and err.count("\n") == 1
    assert message in err and ("'x.log'" in err or "columns" in err)


@pytest.mark.parametrize(("content", "message"), [("", "it is empty"), (certlog.HEADER + "Killed\n" + ROW, "line 2")])
@pytest.mark.parametrize("flags", [["good.log", "bad.log"], ["--compare", "good.log", "bad.log"]])
def test_a_broken_log_among_good_ones_is_named(script, tmp_path, flags, content, message):
    random_log(tmp_path / "good.log", 10, 0)
    (tmp_path / "bad.log").write_text(content)
    code, out, err = script("report.py", *flags)
    assert code == 2 and not out and err.count("\n") == 1 and "'bad.log'" in err and message in err


@pytest.mark.parametrize("name", ["dataset", "arch", "num_heads", "noise_sd", "head"])
def test_a_configuration_that_lacks_a_field_is_passed_over(script, tmp_path, name):
    log = random_log(tmp_path / "x.log", 10, 0)
    config = {field: value for field, value in CONFIG.items() if field != name}
    log.with_suffix(".json").write_text(json.dumps({"config": config, "about": {}}))
    code, _, err = script("report.py", "x.log")
    assert code == 0 and err.count("\n") == 1 and f"not a configuration of ours: {name} missing or wrong" in err


@pytest.mark.parametrize(
    "fields", [{"noise_sd": "0.5"}, {"arch": None}, {"dataset": 3}, {"head": "all"}, {"num_heads": [None]}]
)
def test_a_configuration_with_a_wrong_field_is_passed_over(script, tmp_path, fields):
    with_config(random_log(tmp_path / "x.log", 10, 0), **fields)
    code, out, err = script("report.py", "x.log", "--format", "json")
    assert code == 0 and len(json.loads(out)["logs"]) == 1
    assert err.count("\n") == 1 and f"not a configuration of ours: {next(iter(fields))} missing or wrong" in err


def test_heads_alone_need_the_fields_that_make_a_certificate(script, certify):
    log = certify("a")
    file = log.with_name(log.name.removesuffix(".log") + ".json")
    content = json.loads(file.read_text())
    del content["config"]["alpha"]
    file.write_text(json.dumps(content))
    code, _, err = script("report.py", log, "--heads")
    assert code == 2 and err.count("\n") == 1 and "alpha missing or wrong" in err
    del content["config"]["noise_sd"]
    file.write_text(json.dumps(content))
    code, _, err = script("report.py", log, "--heads")
    assert code == 0 and "noise_sd missing or wrong" in err and "its heads alone are left out" in err


def test_the_votes_of_a_run_that_goes_on_are_read_as_far_as_its_log(script, certify):
    """They are written before their row; the last line may not be whole yet."""
    log = certify("a")
    counts = beside(log, "-counts.jsonl").read_text()
    beside(log, "-counts.jsonl").write_text(counts[:-40])
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-2]))
    code, out, err = script("report.py", log, "--heads", "--format", "json")
    assert (code, err) == (0, "") and [one["images"] for one in json.loads(out)["logs"]] == [10] * 4


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
        assert err.count("\n") == 2 and "'a/begun.log' has no row yet" in err and "not a configuration of ours" in err


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
