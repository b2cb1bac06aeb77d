"""Which logs a report is of, in which order, and what it calls them."""

import io
import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import EXCERPTS, random_log, with_config

from spacte.report.labels import _differing, labels
from spacte.report.reading import read_runs


def named(*logs):
    """The titles of runs, and their names in a picture."""
    runs = read_runs(list(logs))
    return [run.title for run in runs], labels([[run] for run in runs])


def test_a_run_is_called_what_its_user_called_it(tmp_path):
    """Folders that all share, or that say a fact, are no label; logs of one folder are called as their flags do."""
    logs = [random_log(tmp_path / place / "noise-0.25" / "run.log", 10, seed) for seed, place in enumerate("ab")]
    assert named(*logs) == (["a", "b"], ["a", "b"])
    deeper = tmp_path / "c" / "d" / "noise-0.25" / "run.log"  # another depth: still nothing of the folders above
    assert named(*logs, random_log(deeper, 10, 2))[0] == ["a", "b", "c/d"]
    other = random_log(tmp_path / "noise-0.25" / "other.log", 10, 3)
    places = ["a/noise-0.25/run", "b/noise-0.25/run", "noise-0.25/other"]  # one has no label: what is known, then
    assert named(*logs, other) == (["a", "b", "other"], [f"sigma 0.25 ({place})" for place in places])
    assert named(other, random_log(tmp_path / "noise-0.25" / "x.log", 10, 4))[0] == ["other", "x"]
    assert labels([[run] for run in read_runs([EXCERPTS])])[0] == "Gaussian, 5 heads, sigma 0.25"
    plain = [replace(run, training=({"paced_by": "none"},)) for run in read_runs([EXCERPTS])]
    assert labels([[run] for run in plain])[0] == "Gaussian, 5 heads, no teaching, sigma 0.25"


def test_labels_of_folders_of_unequal_depth(tmp_path):
    """An ensemble's folder has no seed: the machine's folders and the layout's own are cut off nevertheless."""
    tail = "digits/R8/noise-0.50/certify-mhead"
    logs = [with_config(random_log(tmp_path / f"my/0Gaussian/{place}/{tail}/h-5-x.log", 10, seed))
            for seed, place in enumerate(("5-heads/seed-10", "5-heads/seed-2", "5-networks"))]  # fmt: skip
    assert named(*logs)[0] == ["5-heads/seed-2", "5-heads/seed-10", "5-networks"]  # numbers by size
    assert named(*logs[:2])[0] == ["seed-2", "seed-10"]


# --- which logs, and in which order ---


def test_each_run_stands_before_its_heads(script, certify, digits_models):
    """Not all ensembles first, nor head 10 before head 2."""
    for name in "ab":
        certify(name, "--max", 60)
    _, out, _ = script("report.py", "a", "b", "--heads", "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    heads = ["3", "head 0 of 3", "head 1 of 3", "head 2 of 3"]
    assert table["heads"].tolist() == heads * 2 and table["run"].tolist() == ["a"] * 4 + ["b"] * 4


def test_a_merged_logs_shards_are_left_out_of_a_folder(script, certify):
    shards = [certify(name, "--max", 180, "--shard", f"{number}/2") for number, name in enumerate("ab", start=1)]
    for path in shards[1].parent.iterdir():
        path.rename(shards[0].parent / path.name)
    shards[1] = shards[0].parent / shards[1].name
    assert [run.path for run in read_runs([shards[0].parent])] == shards
    assert script("merge_logs.py", *shards)[0] == 0
    merged = shards[0].with_name(shards[0].name.replace("-shard-1-of-2", ""))
    assert [run.path for run in read_runs([merged.parent])] == [merged]
    assert [run.path for run in read_runs(shards)] == shards  # who asks for them gets them
    lines = merged.read_text().splitlines(keepends=True)
    merged.write_text("".join(lines[:-1]))  # not whole: the second shard holds more
    assert [run.path for run in read_runs([merged.parent])] == [merged, shards[1]]


# --- logs of another kind ---

ATTACK = "idx\tlabel\tpredict\tradius\tattack_radius\tadversarial\tcorrect\tbroken\ttime\n"
ATTACK += "0\t3\t3\t0.5\t0.25\t3\t1\t0\t0:00:01\n0\t3\t3\t0.5\t0.5\t3\t1\t0\t0:00:01\n"
PREDICTION = "idx\tlabel\tpredict\tcorrect\ttime\n0\t3\t3\t1\t0:00:01\n"


@pytest.mark.parametrize("rows", [2, 3])
def test_a_folder_stands_for_its_certification_logs_alone(script, tmp_path, rows):
    """An attack's log of one radius has each idx once, one of two radii twice."""
    random_log(tmp_path / "certify-mhead/run.log", 10, 0)
    for kind, content in (("attack", ATTACK), ("predict", PREDICTION)):
        (tmp_path / f"{kind}-mhead").mkdir()
        lines = content.splitlines(keepends=True)
        (tmp_path / f"{kind}-mhead/run.log").write_text("".join(lines[:rows]))
    code, out, err = script("report.py", tmp_path, "--format", "json")
    assert code == 0 and not err and [row["images"] for row in json.loads(out)["logs"]] == [10]


def test_a_configuration_says_of_which_kind_a_log_is(script, tmp_path):
    for kind in ("certify", "attack"):
        with_config(random_log(tmp_path / f"{kind}.log", 10, 0), kind=kind)
    assert [run.name for run in read_runs([tmp_path])] == ["certify"]
    code, _, err = script("report.py", "attack.log")
    assert code == 2 and "'attack.log' is an attack log: give a certification log" in err


@pytest.mark.parametrize(("content", "kind"), [(ATTACK, "an attack"), (PREDICTION, "a prediction")])
def test_a_log_of_another_kind_is_named(script, tmp_path, content, kind):
    (tmp_path / "x.log").write_text(content)
    code, out, err = script("report.py", "x.log")
    assert code == 2 and not out and err == f"report.py: error: 'x.log' is {kind} log: give a certification log\n"


def test_runs_that_look_alike_are_told_apart(script, tmp_path):
    """In one folder by what their flags call them, and, of one name, by their files."""
    for place in ("a/h-5-x.log", "a/h-5-y.log", "b/h-5-x.log"):
        with_config(random_log(tmp_path / place, 10, 0))
    titles, names = named(*sorted(tmp_path.rglob("*.log")))
    assert titles == ["a (h-5-x)", "a (h-5-y)", "b"] and names == titles
    for alpha in ("", "-alpha-0.01"):
        with_config(random_log(tmp_path / f"c/x-certify-skip-1{alpha}.log", 10, 0), alpha=float(alpha[7:] or 0.001))
    titles, _ = named(*sorted((tmp_path / "c").glob("*.log")))
    assert titles == ["x", "x (alpha-0.01)"]


def test_runs_of_one_label_say_in_what_they_differ(tmp_path):
    for sigma in (0.25, 0.5):
        for place in "ab":
            tail = f"{place}/digits/R8/noise-{sigma:.2f}/x.log"
            with_config(random_log(tmp_path / tail, 10, 0), noise_sd=sigma)
    runs = read_runs([tmp_path])
    assert labels([[run] for run in runs]) == ["a, sigma 0.25", "b, sigma 0.25", "a, sigma 0.5", "b, sigma 0.5"]
    again = runs[0].config.with_certificate(certificate="all-votes")
    both = [runs[0], replace(runs[0], config=again)]
    both = [replace(run, label="a") for run in both]
    assert labels([[run] for run in both]) == ["a, cohen", "a, all-votes"]


def test_a_defence_may_be_called_anything(tmp_path):
    for place in "ab":
        with_config(random_log(tmp_path / f"A+B (x/{place}/x.log", 10, 0), defence="A+B (x")
    assert named(*tmp_path.rglob("*.log"))[0] == ["a", "b"]


def test_logs_of_two_places_of_a_machine_are_called_by_few_folders():
    parts = [["var", "shared", "alice", "runs", "seed-1"], ["tmp", "mine", "seed-2"]]
    assert _differing(parts) == [["runs", "seed-1"], ["mine", "seed-2"]]
    assert _differing([["var", "x", "runs", "seed-1"], ["tmp", "y", "runs", "seed-1"]]) == [["var", "x"], ["tmp", "y"]]
    deeper = [["var", "x", "runs", "seed-1", "a"], ["tmp", "y", "runs", "seed-1", "b"]]
    assert _differing(deeper) == [["seed-1", "a"], ["seed-1", "b"]]


def test_logs_of_two_methods_are_no_seeds_of_one(script, tmp_path):
    for method in ("cohen", "salman"):
        random_log(tmp_path / method / "noise_0.25/x.log", 10, len(method))
    _, out, _ = script("report.py", tmp_path, "--over_seeds", "--format", "csv")
    assert pd.read_csv(io.StringIO(out))["run"].tolist() == ["cohen, 1 run", "salman, 1 run"]
