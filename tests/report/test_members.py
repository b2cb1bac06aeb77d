"""What the vote adds to its members, and each class's certified accuracy: known votes."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from known_votes import SIGMA, N, run_with, votes

from spacte.logs.certlog import HEADER, average_certified_radius, certified_accuracy, read_log
from spacte.report.members import remarks
from spacte.report.reading import read_runs
from spacte.report.recount import draws_of, votes_of
from spacte.smooth.bounds import lower_confidence_bound, radius_of


def radius(n):
    return float(radius_of(lower_confidence_bound(n, N, 0.001), SIGMA))


def shown(script, *flags):
    code, out, err = script("report.py", *flags, "--format", "csv")
    assert code == 0, err
    return pd.read_csv(io.StringIO(out)), err


# --- --members ---


def test_the_vote_its_members_and_what_it_adds(script, tmp_path):
    """Two heads on two images: radii, total variation and deviations worked out by hand."""
    images = [(0, votes((900, 50), (800, 200), (950, 50))), (1, votes((100, 700), (600, 300), (300, 650)))]
    log = run_with(tmp_path / "1.log", images)
    table, _ = shown(script, log, "--members")
    (row,) = table.to_dict("records")
    of_vote = (radius(950) + radius(650)) / 2
    first, second = (radius(900) + radius(700)) / 2, radius(800) / 2  # the second head is wrong on the second image
    assert row["ACR"] == pytest.approx(of_vote, abs=1e-5)
    assert row["mean ACR"] == pytest.approx((first + second) / 2, abs=1e-5)
    assert row["adds"] == pytest.approx(of_vote - (first + second) / 2, abs=1e-5)
    assert (row["clean"], row["mean clean"], row["images"], row["drawn"]) == (1, 0.75, 2, 2)
    assert row["each ACR"] == f"{second:.3f} {first:.3f}" and row["each clean"] == "0.500 1.000"
    shares = np.array([[[0.9, 0.05, 0.05], [0.8, 0.2, 0]], [[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]]])
    variation = np.abs(shares[:, 0] - shares[:, 1]).sum(1).mean() / 2
    assert row["TV"] == pytest.approx(variation)
    assert row["sd p"] == pytest.approx((np.std([0.9, 0.8], ddof=1) + np.std([0.7, 0.3], ddof=1)) / 2)
    assert np.isnan(row["low"]), "two images tell no interval"


def test_what_the_vote_adds_has_an_interval_over_images_and_over_seeds(script, tmp_path):
    """60 images on which the vote certifies more than either head: the interval lies around the mean and above 0."""
    rng = np.random.default_rng(0)
    for seed in (1, 2, 3):
        draws = rng.integers(700, 850, 60)
        images = [(0, votes((n, 50), (n - 20, 50), (n + 60, 20))) for n in draws]
        run_with(tmp_path / f"seed-{seed}" / "run.log", images, seed)
    each, _ = shown(script, tmp_path, "--members")
    together, _ = shown(script, tmp_path, "--members", "--over_seeds")
    assert len(each) == 3 and len(together) == 1 and together["run"][0] == "run, 3 runs"
    for name in ("ACR", "mean ACR", "adds", "TV"):
        assert together[name][0] == pytest.approx(each[name].mean())
    for table in (each, together):
        assert ((table["low"] > 0) & (table["low"] < table["adds"]) & (table["adds"] < table["high"])).all()


def test_images_that_were_not_drawn_are_wrong_for_all_and_said_so(script, tmp_path):
    drawn = votes((900, 50), (800, 200), (950, 50))
    log = run_with(tmp_path / "1.log", [(0, drawn), (0, None), (0, None)], skip_wrong=True)
    table, err = shown(script, log, "--members")
    assert (table["images"][0], table["drawn"][0]) == (3, 1) and "upper bound" in err
    assert table["ACR"][0] == pytest.approx(average_certified_radius(read_log(log)), abs=1e-6)
    assert table["mean ACR"][0] == pytest.approx((radius(900) + radius(800)) / 2 / 3, abs=1e-5)
    assert table["TV"][0] == pytest.approx(0.15), "of the image that was drawn"


def test_ensembles_are_compared_on_the_images_that_all_have_counted(script, tmp_path):
    """One counts an image of which its heads disagree, too; one head alone, and other settings, narrow nothing."""
    alike, apart = votes((900, 50), (800, 200), (950, 50)), votes((900, 50), (500, 500), (700, 250))
    both = run_with(tmp_path / "both" / "run.log", [(0, alike), (0, apart)], 1, skip_wrong=True)
    one = run_with(tmp_path / "one" / "run.log", [(0, alike), (0, None)], 2, skip_wrong=True)
    other = run_with(tmp_path / "other" / "run.log", [(0, None), (0, apart)], 3, skip_wrong=True, alpha=0.01)
    head = [(0, None), (0, votes((900, 50)))]
    single = run_with(tmp_path / "single" / "run.log", head, 4, skip_wrong=True, num_heads=[1])
    table, err = shown(script, both, one, single, other, "--members")
    found = table.set_index(table["run"].str.split(",").str[0])
    assert found["TV"][["both", "one", "other"]].tolist() == pytest.approx([0.15, 0.15, 0.45])
    assert found["shared"][["both", "one", "other"]].tolist() == [1, 1, 1]
    assert np.isnan(found["TV"]["single"])
    assert found["drawn"].to_dict() == {"both": 2, "one": 1, "other": 1, "single": 1} and "shared images" in err
    alone, _ = shown(script, both, "--members")
    assert alone["TV"][0] == pytest.approx((0.15 + 0.45) / 2) and alone["shared"][0] == 2
    rest = run_with(tmp_path / "rest" / "run.log", [(0, None), (0, apart)], 5, skip_wrong=True)
    nothing, _ = shown(script, one, rest, "--members")
    assert nothing["shared"].tolist() == [0, 0] and nothing["TV"].isna().all()


def test_one_head_is_its_own_member(script, tmp_path):
    log = run_with(tmp_path / "1.log", [(0, votes((900, 50))), (1, votes((100, 800)))], num_heads=[1])
    table, _ = shown(script, log, "--members")
    assert table["ACR"][0] == table["mean ACR"][0] and table["adds"][0] == 0 and np.isnan(table["TV"][0])
    assert "TV" not in script("report.py", log, "--members")[1], "no column of which nothing is known"


def test_a_log_without_counts_and_a_consensus_are_left_out(script, tmp_path):
    images = [(0, votes((900, 50), (800, 200), (950, 50)))]
    log, other = run_with(tmp_path / "1.log", images), run_with(tmp_path / "2.log", images, consensus=2)
    (tmp_path / "1-counts.jsonl").unlink()
    code, out, err = script("report.py", log, other, "--members")
    assert code == 2 and "--members: no log tells what its members voted" in err
    flags = ("--members", "--format", "json", "--html", tmp_path / "page.html")
    code, out, err = script("report.py", log, other, *flags)
    assert code == 0 and json.loads(out)["members"] == [] and (tmp_path / "page.html").exists()
    assert "no vote counts lie beside" in err and "consensus" in err and "members are left out" in err


def test_seeds_are_paired_by_their_images_and_too_few_tell_nothing(script, tmp_path):
    """The same votes in another order in the second log: the interval is the same; of 20 images there is none."""
    rng = np.random.default_rng(2)
    found = {}
    for label, images in (("all", 60), ("few", 20)):
        made = [(0, votes((n, 50), (n - 20, 50), (n + int(n) % 60, 20))) for n in rng.integers(600, 900, images)]
        for order in ("same", "other"):
            for seed in (1, 2):
                log = run_with(tmp_path / label / order / f"seed-{seed}" / "run.log", made, seed)
                if (order, seed) == ("other", 2):
                    for path in (log, log.with_name("run-counts.jsonl")):
                        header = [HEADER] if path == log else []
                        lines = path.read_text().splitlines(keepends=True)[len(header) :]
                        path.write_text("".join(header + lines[::-1]))
            table, _ = shown(script, tmp_path / label / order, "--members", "--over_seeds")
            found[label, order] = table[["low", "high"]].to_numpy()
    np.testing.assert_allclose(found["all", "same"], found["all", "other"])
    assert np.isfinite(found["all", "same"]).all() and np.isnan(found["few", "same"]).all()


def test_one_run_is_enough_for_a_remark(tmp_path):
    """One head, two heads that skip what is wrong, two heads that stop early."""
    of_one, of_two = votes((900, 50)), votes((900, 50), (800, 200), (950, 50))
    one = run_with(tmp_path / "one.log", [(0, of_one)], num_heads=[1])
    skipping = run_with(tmp_path / "skipping.log", [(0, of_two), (0, None)], skip_wrong=True)
    early = run_with(tmp_path / "early.log", [(0, of_two)], sequential={"radii": [0.25], "give_up": 0.01})
    said = {
        names: [line.split(":")[0].split(" ")[0] for line in remarks(read_runs([*logs]))]
        for names, logs in {"one": (one,), "skipping": (one, skipping), "all": (one, skipping, early)}.items()
    }
    assert said == {"one": [], "skipping": ["ACR", "drawn"], "all": ["ACR", "drawn", "Sequential"]}


# --- --by_class ---


def test_each_class_stands_alone_beside_the_mean(script, tmp_path):
    images = [(0, votes((900, 50), (900, 50), (990, 10))), (0, votes((900, 50), (900, 50), (600, 10))),
              (1, votes((100, 800), (100, 800), (100, 800))), (2, votes((900, 50), (900, 50), (990, 10)))]  # fmt: skip
    log = run_with(tmp_path / "1.log", images)
    table, err = shown(script, log, "--by_class", "0.3")
    assert table["radius"].tolist() == [0, 0.3]
    assert table[["0", "1", "2"]].to_numpy().tolist() == [[1, 1, 0], [0.5, 1, 0]]
    assert table["mean"].tolist() == certified_accuracy(read_log(log), [0, 0.3]).tolist()
    assert table["smallest"].tolist() == [0, 0]
    assert "gives up" not in err, "one image tells nothing"


def test_a_class_of_which_no_image_is_right_is_named(script, tmp_path):
    right, wrong = votes((900, 50), (900, 50), (990, 10)), votes((100, 800), (100, 800), (100, 800))
    log = run_with(tmp_path / "1.log", [(0, right)] * 10 + [(2, wrong)] * 10 + [(1, right)] * 9)
    _, err = shown(script, log, "--by_class")
    assert "gives up class 2 (10 images): none is right even at radius 0; nor of class 1 (9 images), which may" in err
    assert "gives up class 2" in script("report.py", log, "--by_class")[1], "a line below the table"


def test_classes_are_in_order_and_a_class_that_a_log_has_not_is_empty(script, tmp_path):
    right = votes((900, 50), (900, 50), (990, 10))
    logs = [run_with(tmp_path / "a.log", [(2, right)]), run_with(tmp_path / "b.log", [(2, right), (0, right)])]
    table, _ = shown(script, *logs, "--by_class", "0")
    assert table.columns.tolist()[-3:] == ["0", "2", "run"] and np.isnan(table["0"][0])


def test_the_tables_of_members_and_classes_are_on_the_page_and_in_json(script, tmp_path):
    log = run_with(tmp_path / "1.log", [(0, votes((900, 50), (800, 200), (950, 50)))] * 3)
    page = tmp_path / "page.html"
    code, out, err = script("report.py", log, "--members", "--by_class", "--format", "json", "--html", page)
    assert code == 0, err
    found = json.loads(out)
    assert found["members"][0]["images"] == 3 and [row["radius"] for row in found["by_class"]] == [0, 0.5]
    text = page.read_text()
    data = json.loads(text[text.index("const data = ") + 13 : text.index(";\nconst PAGE")])
    members, classes = data["parts"]
    assert members["title"] == "What the vote adds to its members" and members["shaded"] == []
    assert classes["title"] == "Certified accuracy by class" and classes["shaded"] == ["mean", "smallest", "0"]
    label = data["rows"][0]["label"]
    assert label != found["logs"][0]["run"] and {row[0] for part in data["parts"] for row in part["rows"]} == {label}


def test_csv_is_one_table(script, tmp_path):
    log = run_with(tmp_path / "1.log", [(0, votes((900, 50), (800, 200), (950, 50)))])
    code, _, err = script("report.py", log, "--members", "--by_class", "--format", "csv")
    assert code == 2 and "request only one of --members and --by_class" in err
    code, _, err = script("report.py", log, "--members", "--baseline", log, "--format", "csv")
    assert code == 2 and "request only one of --members and comparisons (--compare, --baseline)" in err
    code, _, err = script("report.py", "--members")
    assert code == 2 and "nothing to read" in err
    code, _, err = script("report.py", "--compare", log, log, "--by_class", "0")
    assert code == 2 and "--by_class needs logs" in err


def test_members_are_sorted_in_each_seed(script, tmp_path):
    """Whose number says nothing: the first head is the better one in one seed, the second in the other."""
    for seed, (first, second) in enumerate([(900, 700), (700, 900)]):
        run_with(tmp_path / f"seed-{seed}" / "run.log", [(0, votes((first, 50), (second, 50), (950, 20)))], seed)
    table, _ = shown(script, tmp_path, "--members", "--over_seeds")
    assert table["each ACR"][0] == f"{radius(700):.3f} {radius(900):.3f}"


def test_a_sequential_run_has_no_interval_of_what_its_vote_adds(script, tmp_path):
    rng = np.random.default_rng(0)
    images = [(0, votes((n, 50), (n - 20, 50), (n + 60, 20))) for n in rng.integers(700, 850, 60)]
    for name, rule in (("fixed", None), ("early", {"radii": [0.0, 0.25], "give_up": 0.01})):
        log = run_with(tmp_path / name / "run.log", images, sequential=rule)
        table, _ = shown(script, log, "--members")
        assert table[["low", "high"]].isna().all(axis=None) == (name == "early")


def test_members_of_several_seeds_are_the_means_over_all(script, tmp_path):
    right = votes((900, 50), (800, 50), (950, 20))
    run_with(tmp_path / "seed-1" / "run.log", [(0, right), (0, right), (0, None), (0, None)], 1, skip_wrong=True)
    run_with(tmp_path / "seed-2" / "run.log", [(0, right), (0, right), (0, right), (0, right)], 2, skip_wrong=True)
    table, _ = shown(script, tmp_path, "--members", "--over_seeds")
    assert (table["clean"][0], table["mean clean"][0], table["drawn"][0]) == (0.75, 0.75, 3)


def test_the_classes_of_several_seeds_are_the_means_over_all(script, tmp_path):
    right, wrong = votes((900, 50), (900, 50), (990, 10)), votes((100, 800), (100, 800), (100, 800))
    for seed, second in enumerate((right, wrong)):
        run_with(tmp_path / f"seed-{seed}" / "run.log", [(0, right), (0, second), (1, wrong)], seed)
    table, _ = shown(script, tmp_path, "--by_class", "0", "--over_seeds")
    assert (table["0"][0], table["1"][0], table["smallest"][0]) == (0.75, 1, 0.75)
    assert table["mean"][0] == pytest.approx(5 / 6)


def test_an_image_that_was_not_drawn_has_no_votes(tmp_path):
    log = run_with(tmp_path / "1.log", [(0, votes((900, 50), (800, 200), (950, 50))), (0, None)], skip_wrong=True)
    (run,) = read_runs([log])
    assert [int(one.sum()) for one in votes_of(run)] == [1000, 0]
    assert [int(one.sum()) for one in votes_of(run, or_selection=True)] == [1000, 100]


def test_draws_that_skip_wrong_spares_are_not_counted(tmp_path):
    images = [(0, votes((900, 50), (800, 200), (950, 50))), (0, None)]
    log = run_with(tmp_path / "1.log", images, skip_wrong=True, precision="fp32", exact_noise=False, skip=1)
    (run,) = read_runs([log])
    assert draws_of(run) == N / 2
