"""Runs of one experiment: averaged over their seeds, kept apart where they differ by more."""

import dataclasses
import io

import pandas as pd
import pytest
from conftest import random_log, with_config

from spacte.cli import defaults_of
from spacte.logs import certlog
from spacte.names import _LATER_SETTINGS, PLACE_SETTINGS, as_recorded_today
from spacte.train.settings import Place, Recipe


def test_an_experiment_is_called_as_its_seeds_are(script, tmp_path):
    for label, seed in (("big", 1), ("big", 2), ("small", 1)):
        random_log(tmp_path / f"{label}/seed-{seed}/h-5-{label}.log", 50, seed)
    _, out, _ = script("report.py", tmp_path, "--over_seeds", "--format", "csv")
    assert pd.read_csv(io.StringIO(out))["run"].tolist() == ["big, 2 runs", "small, 1 run"]
    _, out, _ = script("report.py", "--compare", tmp_path / "big", tmp_path / "small")
    assert "'big' and 'small'" in out and "The means over 2 and 1 runs are compared." in out


def test_runs_of_one_name_are_one_row(script, tmp_path):
    """Three seeds of one run, and another run: means and the deviation between the three, by hand."""
    logs = [random_log(tmp_path / f"seed-{seed}" / "h-5-x-certify-skip-1.log", 50, seed) for seed in (1, 2, 3)]
    logs.append(random_log(tmp_path / "seed-1" / "h-1-y.log", 50, 9))
    acr = [certlog.average_certified_radius(certlog.read_log(log)) for log in logs]
    code, out, _ = script("report.py", tmp_path, "--over_seeds", "--format", "csv", "--radii", 0.5)
    assert code == 0
    table = pd.read_csv(io.StringIO(out)).set_index("run")
    row, single = table.loc["h-5-x, 3 runs"], table.loc["h-1-y, 1 run"]
    assert row["ACR"] == pytest.approx(sum(acr[:3]) / 3) and single["ACR"] == pytest.approx(acr[3])
    assert row["SD"] == pytest.approx(pd.Series(acr[:3]).std()) and pd.isna(single["SD"])
    shares = [certlog.certified_accuracy(certlog.read_log(log), [0.5])[0] for log in logs[:3]]
    assert row["0.5"] == pytest.approx(sum(shares) / 3) and row["images"] == 50
    _, out, _ = script("report.py", tmp_path, "--over_seeds", "--radii", 0.5)
    assert f"{row['ACR']:.3f} ± {row['SD']:.3f}" in out and f"{acr[3]:.3f} |" in out.replace("*", "")


def test_runs_of_one_name_and_other_recipes_are_other_rows(script, tmp_path):
    """Two learning rates, two seeds of one of them; an ensemble of both; a log that tells nothing."""
    acr = {}
    for rate, seed in ((0.1, 1), (0.1, 2), (0.3, 1)):
        log = random_log(tmp_path / f"lr-{rate}/seed-{seed}/h-5-x.log", 50, seed + int(10 * rate))
        with_config(log, [{"lr_init": rate, "wd": 0.1, "seed": seed, "save_dir": str(log), "votes_dir": f"v{seed}"}])
        acr.setdefault(rate, []).append(certlog.average_certified_radius(certlog.read_log(log)))
    with_config(random_log(tmp_path / "both/h-5-x.log", 50, 8), [{"lr_init": rate, "wd": 0.1} for rate in acr])
    random_log(tmp_path / "unknown/h-5-x.log", 50, 9)
    code, out, err = script("report.py", tmp_path, "--over_seeds", "--format", "csv", "--radii", 0.5)
    assert code == 0, err
    table = pd.read_csv(io.StringIO(out)).set_index("run")["ACR"]
    means = {"lr-0.1, 2 runs": sum(acr[0.1]) / 2, "lr-0.3, 1 run": acr[0.3][0]}
    assert set(table.index) == {*means, "both, 1 run", "unknown, 1 run"}
    assert all(table[name] == pytest.approx(mean) for name, mean in means.items())


def test_seeds_that_other_code_has_trained_are_averaged_with_a_warning(script, tmp_path):
    for seed, source in enumerate(("a", "b", None, "a")):
        log = random_log(tmp_path / f"mine/seed-{seed}/h-5-x.log", 10, seed)
        with_config(log, [{"seed": seed} | ({"source": {"source_sha256": source * 64}} if source else {})])
    code, out, err = script("report.py", "mine", "--over_seeds", "--radii", 0.5)
    assert code == 0 and "h-5-x, 4 runs" in out
    assert "the runs of 'h-5-x' were trained by different code (source_sha256 aaaaaaaa, bbbbbbbb)" in err
    code, _, err = script("report.py", "mine/seed-0", "mine/seed-3", "--over_seeds", "--radii", 0.5)
    assert code == 0 and "different code" not in err


def test_ensembles_that_share_a_network_are_rows_of_their_own(script, tmp_path):
    """They are no seeds of each other."""
    for label, networks in (("five/seeds-1-2", "ab"), ("sound/seeds-1-3", "ac"), ("sound/seeds-4-5", "de")):
        log = random_log(tmp_path / label / "h-1-xx2.log", 10, len(label))
        with_config(log, num_heads=[1, 1], checkpoint_sha256=[name * 64 for name in networks])
    code, out, err = script("report.py", tmp_path, "--over_seeds", "--format", "csv")
    assert code == 0, err
    rows = ["five/seeds-1-2, 1 run", "sound/seeds-1-3, 1 run", "sound/seeds-4-5, 1 run"]
    assert pd.read_csv(io.StringIO(out))["run"].tolist() == rows
    with_config(tmp_path / "five/seeds-1-2/h-1-xx2.log", num_heads=[1, 1], checkpoint_sha256=["e" * 64, "f" * 64])
    code, out, err = script("report.py", tmp_path / "sound", tmp_path / "five", "--over_seeds", "--format", "csv")
    assert code == 0 and len(pd.read_csv(io.StringIO(out))) == 3, "one shares a network with one of the others"


def test_hashes_that_an_older_run_has_not_recorded_make_no_other_row(script, tmp_path):
    """What a training took from files: one run does not say, two say the same; another one's file is another's."""

    def rows(*taken):
        for seed, inputs in enumerate(taken):
            log = random_log(tmp_path / f"{len(taken)}/seed-{seed}/h-5-x.log", 10, seed)
            with_config(log, [{"seed": seed} | ({"inputs": {"teachers": [inputs * 64]}} if inputs else {})])
        code, out, err = script("report.py", str(len(taken)), "--over_seeds", "--format", "csv", "--radii", 0.5)
        assert code == 0, err
        return set(pd.read_csv(io.StringIO(out))["run"])

    assert rows(None, "a", "a") == {"h-5-x, 3 runs"}
    assert rows("a", "b", "a", "a") == {
        "h-5-x, inputs teachers aaaaaaaa, 3 runs",
        "h-5-x, inputs teachers bbbbbbbb, 1 run",
    }


def test_seeds_of_one_folder_may_have_learnt_from_files_of_their_own(script, tmp_path):
    """As a whole method's seeds have; that is said once. Another folder's runs stay another row."""
    for label, taken in (("own", "abb"), ("other", "ac")):
        for seed, inputs in enumerate(taken):
            log = random_log(tmp_path / f"{label}/seed-{seed}/h-5-x.log", 10, seed)
            with_config(log, [{"seed": seed, "inputs": {"teachers": [inputs * 64]}}])
    code, out, err = script("report.py", tmp_path, "--over_seeds", "--format", "csv", "--radii", 0.5)
    assert code == 0 and set(pd.read_csv(io.StringIO(out))["run"]) == {"own, 3 runs", "other, 2 runs"}
    told = "the runs of 'own' did not all learn from the same files (teachers aaaaaaaa; teachers bbbbbbbb): what others"
    assert err.count(told) == 1 and err.count("the same files") == 2
    code, out, err = script("report.py", "--compare", "own", "other")
    assert code == 0 and err.count(told) == 1


def test_the_places_of_a_defence_of_ones_own_make_no_other_row(script, tmp_path):
    """Where a training's features lie differs from seed to seed; that all began with one prior is said."""
    for side in ("a", "b"):
        for seed in range(3):
            log, where = random_log(tmp_path / side / f"seed-{seed}" / "run.log", 50, seed), f"/{seed}"
            own = {"features_dir": where, "places": ["features_dir"], "prior": where, "inputs": {"prior": ["1" * 64]}}
            with_config(log, [{"seed": seed} | own])
    code, out, err = script("report.py", "a", "b", "--over_seeds", "--compare", "a", "b")
    assert code == 0, err
    assert "a, 3 runs" in out and "All 3 runs of 'a' took the same prior: what another would change" in out


def test_an_older_name_of_one_head_is_no_other_experiment(script, tmp_path):
    """One head depends neither on eps nor, unless it paces itself, on lbdlast: other values are no other recipe."""
    names = ("h-1-eps-0.8-m-2-lbdlast-0.8", "h-1-eps-0.5-m-2-lbdlast-1.6", "h-1-m-2")
    for seed, (name, lbdlast) in enumerate(zip(names, (0.8, 1.6, 1.2), strict=True)):
        for pace in ("", "-paced-by-self"):
            kept = f"-lbdlast-{lbdlast}" if name == names[2] and pace else ""
            log = random_log(tmp_path / f"seed-{seed}" / f"{name}{kept}{pace}-certify-skip-1.log", 10, seed)
            by = "self" if pace else "neighbour"
            with_config(log, [{"num_heads": 1, "eps": 0.1 * seed, "lbdlast": lbdlast, "seed": seed, "paced_by": by}])
    code, out, err = script("report.py", tmp_path, "--over_seeds", "--format", "csv", "--radii", 0.5)
    assert code == 0, err
    paced = {f"h-1-m-2-lbdlast-{lbdlast}-paced-by-self, 1 run" for lbdlast in (0.8, 1.6, 1.2)}
    assert set(pd.read_csv(io.StringIO(out))["run"]) == {"h-1-m-2, 3 runs"} | paced


def two_seeds(tmp_path, images=10, training=None, **fields):
    """Two runs of one name: the first is CONFIG's, the second differs in `fields` or in what it was trained with."""
    one, other = (tmp_path / name / "h-5-x-certify-skip-1.log" for name in ("seed-1", "seed-2"))
    recipe = {"seed": 1, "epochs": 9}
    with_config(random_log(one, 10, 1), [recipe], checkpoint_sha256=["a"])
    second = recipe | {"seed": 2} | (training or {})
    with_config(random_log(other, images, 2), [second], **{"checkpoint_sha256": ["b"]} | fields)
    return one, other


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"N0": 10}, "N0 100 and 10"),
        ({"N": 100_000}, "N 1000 and 100000"),
        ({"alpha": 0.01}, "alpha 0.001 and 0.01"),
        ({"sequential": {"tolerance": 0.1}}, "sequential no and tolerance 0.1"),
        ({"skip_wrong": True}, "skip_wrong False and True"),
        ({"exact_noise": True}, "exact_noise False and True"),
        ({"precision": "bf16"}, "precision fp32 and bf16"),
        ({"images": 8}, "10 and 8 images, 8 of them the same"),
        ({"checkpoint_sha256": ["a"]}, "one checkpoint_sha256, a"),
        ({"checkpoint_sha256": ["b", "a"]}, "one checkpoint_sha256, a"),
        ({"training": {"seed": 1}}, "one seed of the training, 1"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(script, tmp_path, fields, message):
    one, other = two_seeds(tmp_path, **fields)
    code, out, err = script("report.py", tmp_path, "--over_seeds")
    found = f"'{one}' and '{other}' are not two seeds of one experiment: {message}; leave one of them out\n"
    assert code == 2 and not out and err.endswith(found) and err.count("\n") == 1


def test_two_recipes_are_not_compared_as_one_experiment(script, tmp_path):
    one, other = two_seeds(tmp_path / "a", training={"epochs": 12})
    random_log(tmp_path / "b.log", 10, 3)
    code, _, err = script("report.py", "--compare", "a", "b.log")
    found = f"{one.relative_to(tmp_path)}' and '{other.relative_to(tmp_path)}"
    assert code == 2 and err.endswith(
        f"'{found}' are not two seeds of one experiment: epochs 9 and 12; leave one of them out\n"
    )


def test_where_a_run_was_trained_is_no_part_of_its_recipe():
    assert [field.name for field in dataclasses.fields(Place)] == [*PLACE_SETTINGS]


def test_of_logs_without_a_configuration_the_images_are_compared(script, tmp_path):
    for seed, images in enumerate((10, 10, 8)):
        random_log(tmp_path / f"seed-{seed}/h-5-x.log", images, seed)
    code, out, _ = script("report.py", "seed-0", "seed-1", "--over_seeds")
    assert code == 0 and "2 runs" in out
    code, _, err = script("report.py", "seed-0", "seed-1", "seed-2", "--over_seeds")
    assert code == 2 and "10 and 8 images" in err


def test_older_trainings_are_known_by_todays_names():
    assert as_recorded_today({"no_teaching": True})["paced_by"] == "none"
    assert as_recorded_today({"no_teaching": False, "lr": 1}) == _LATER_SETTINGS | {"lr": 1}
    assert defaults_of(Recipe) | _LATER_SETTINGS == defaults_of(Recipe)
