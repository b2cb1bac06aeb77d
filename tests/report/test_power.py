"""How many images and draws a measurement takes, by power.py: known votes."""

import numpy as np
import pytest
from conftest import load_file
from known_votes import SIGMA, N, run_with, votes
from scipy.stats import beta, norm

from spacte.report.comparison import compare
from spacte.report.reading import read_runs
from spacte.smooth.bounds import lower_confidence_bound, radius_of


@pytest.fixture
def power(tmp_path):
    return load_file("studies/power.py", tmp_path / "power_copy.py")


@pytest.fixture
def quick_power(power, monkeypatch):
    """power.py that draws a pilot's votes again less often: for what is the same however often it does."""
    monkeypatch.setattr(power, "_DRAWN_AGAIN", 500)
    return power


def test_the_images_give_an_interval_of_the_wanted_width(script, tmp_path, power):
    """At the pilots' own N and images: the planned width is that of their comparison; new votes add little to it."""
    rng, logs = np.random.default_rng(1), []
    for name in "ab":
        images = [(0, votes(*[(int(N * share), 0)] * 3)) for share in rng.uniform(0.3, 0.95, 300)]
        logs.append(run_with(tmp_path / name / "1.log", images))
    runs = [run for log in logs for run in read_runs([log])]
    acr = compare(*runs, [0.5]).table.iloc[0]
    (row,) = power.plan(runs, acr["high"] - acr["low"], [N], None).to_dict("records")
    assert row["images"] == pytest.approx(300, rel=0.1)
    assert row["draws in all"] == row["images"] * (N + 100)
    assert row["seconds"] == pytest.approx(2 * 0.5 * row["images"], rel=1e-2)


def test_a_guess_of_the_deviation_needs_no_log(power):
    (row,) = power.plan([], 0.02, [2000], 0.25).to_dict("records")
    assert row["images"] == np.ceil((2 * 1.960944 * 0.25 / 0.02) ** 2) == 2404, "Student's quantile, of 2,400"
    assert row["draws in all"] == 2404 * 2100 and np.isnan(row["seconds"])


def test_enough_images_differ_for_an_interval(tmp_path, power):
    """Of these pilots' images every tenth does."""
    logs = []
    for name, other in (("a", 900), ("b", 600)):
        images = [(0, votes(*[(other if k % 10 == 0 else 10, 0)] * 3)) for k in range(100)]
        logs.append(run_with(tmp_path / name / "1.log", images))
    runs = [run for log in logs for run in read_runs([log])]
    (row,) = power.plan(runs, 0.5, [N], None).to_dict("records")
    assert row["images"] == 500


def few_images(folder, pilot):
    """A pilot of 90 images."""
    shares = np.random.default_rng(pilot).uniform(0.5, 0.95, 90)
    return run_with(folder / f"{pilot}.log", [(0, votes(*[(int(N * share), 0)] * 3)) for share in shares])


@pytest.mark.parametrize("pilot", range(4))
def test_few_images_of_a_pilot_tell_the_same_whichever_votes_are_drawn_again(tmp_path, power, pilot):
    runs = read_runs([few_images(tmp_path, pilot)])
    found = [power.plan(runs, 0.02, [500], None, seed)["images"][0] for seed in (0, 1, 2)]
    assert max(found) < 1.06 * min(found)


def test_few_images_of_a_pilot_say_how_little_they_tell(tmp_path, quick_power):
    """The number of images follows the pilot's own within the error given, as 40 pilots show."""
    tables = [quick_power.plan(read_runs([few_images(tmp_path, pilot)]), 0.02, [500], None) for pilot in range(40)]
    numbers, errors = ([table[column][0] for table in tables] for column in ("images", "error"))
    spread = np.std(numbers, ddof=1) / np.mean(numbers)
    assert np.mean(errors) == pytest.approx(1.96 * spread, rel=0.3)


def test_a_power_that_cannot_be_said_is_one_line(script, tmp_path):
    log = run_with(tmp_path / "1.log", [(0, votes((900, 50), (800, 200), (950, 50)))] * 3)
    for flags, message in (
        ((), "give one log, two logs, or --deviation"),
        ((log, log, log), "give one log, two logs"),
        ((run_with(tmp_path / "2.log", [(0, votes((900, 50)))], sequential={"radii": [0.5]}),), "stopped early"),
    ):
        code, _, err = script("studies/power.py", "--width", 0.02, *flags)
        assert code == 2 and message in err
    code, _, err = script("studies/power.py", "--width", 0.02, log, "--N", 1000)
    assert code == 2 and "the pilot's radii vary no more than its draws explain" in err
    one = run_with(tmp_path / "3.log", [(0, votes((900, 50)))])
    assert "at least 2 images" in script("studies/power.py", "--width", 0.02, one)[2]


@pytest.mark.parametrize("planned", [200, N, 10_000])
def test_the_pilots_own_draws_are_not_counted_twice(tmp_path, power, planned):
    """Two close classifiers: the planned deviation is that of their true probabilities, simulated."""
    rng = np.random.default_rng(3)
    first = rng.uniform(0.55, 0.9, 2000)
    true, logs = [first, first + rng.normal(0, 0.01, 2000)], []
    for name, shares in zip("ab", true, strict=True):
        images = [(0, votes(*[(n, 0)] * 3)) for n in rng.binomial(N, shares)]
        logs.append(run_with(tmp_path / name / "1.log", images))
    runs = [run for log in logs for run in read_runs([log])]
    (row,) = power.plan(runs, 0.02, [planned], None).to_dict("records")
    drawn = [rng.binomial(planned, shares) for shares in true]
    bounds = [beta.ppf(0.001, n, planned - n + 1) for n in drawn]  # Clopper and Pearson's
    radii = [SIGMA * np.where(bound > 0.5, norm.ppf(np.clip(bound, 0.5, 1)), 0) for bound in bounds]
    assert row["deviation"] == pytest.approx((radii[0] - radii[1]).std(), rel=0.2)


def spread_out(images=3):
    """Images whose radii differ, for a label of 0."""
    return [(0, votes(*[(int(n), 0)] * 3)) for n in np.linspace(600, 950, images)]


def test_pilots_of_other_images_are_refused(script, tmp_path):
    first, *others = spread_out()
    log, relabelled = run_with(tmp_path / "1.log", [first, *others]), run_with(tmp_path / "2.log", [(1, first[1])])
    code, _, err = script("studies/power.py", "--width", 0.02, log, relabelled)
    assert code == 2 and "two data sets in one report" in err and "idx 0 has label 1, but 0 in" in err
    hashed = [run_with(tmp_path / f"{sha256}.log", spread_out(), data_sha256=sha256) for sha256 in ("11", "22")]
    code, _, err = script("studies/power.py", "--width", 0.02, *hashed)
    assert code == 2 and "cannot be compared image by image: two data_sha256" in err


def test_the_line_below_the_table_is_of_the_images_that_decide(script, tmp_path, power):
    """The pilot's own, or those that two pilots share: idx 10 to 59, or to 58."""
    rng, logs = np.random.default_rng(0), {}
    for images in (49, 50, 59, 60):
        made = [(0, votes(*[(int(n), 0)] * 3)) for n in rng.uniform(550, 950, images)]
        logs[images] = run_with(tmp_path / f"{images}.log", made)
    later = [(0, votes(*[(int(n), 0)] * 3)) for n in rng.uniform(550, 950, 80)]
    logs["later"] = run_with(tmp_path / "later.log", later, first=10)

    def line(*of):
        code, out, err = script("studies/power.py", "--width", 0.1, *(logs[name] for name in of), "--N", N)
        assert code == 0, err
        return out.splitlines()[-1]

    too_few = "which are too few to say how far they leave that number open."
    error = power.plan(read_runs([logs[50]]), 0.1, [N], None)["error"][0]
    assert f"from the pilot's 49 images, {too_few}" in line(49)
    assert f"from the pilot's 50 images, which leave that number open to within {100 * error:.0f} % (95 %)." in line(50)
    assert "from the 50 images that the pilots share, which leave" in line(60, "later")
    assert f"from the 49 images that the pilots share, {too_few}" in line("later", 59)


def test_draws_seconds_and_the_largest_radius_are_those_of_each_pilot(tmp_path, quick_power):
    """--skip_wrong spares the first pilot's draws on half of its images; the second has the smaller radii."""
    made = spread_out(10)
    skipping = run_with(tmp_path / "a.log", [*made[:5], *[(0, None)] * 5], skip_wrong=True, alpha=0.01)
    runs = [*read_runs([skipping]), *read_runs([run_with(tmp_path / "b.log", made)])]
    for order in (runs, runs[::-1]):
        (row,) = quick_power.plan(order, 0.1, [2 * N], 0.25).to_dict("records")
        assert row["draws in all"] == row["images"] * (100 + 2 * N), "of the pilot that draws more"
        first, second = (100 + N) * 0.5 / (100 + N / 2), (100 + 2 * N) * 0.5 / (100 + N)  # an image took 0.5 s
        assert row["seconds"] == pytest.approx(row["images"] * (first + second))
        assert row["largest radius"] == radius_of(lower_confidence_bound(2 * N, 2 * N, 0.001), SIGMA)
    (alone,) = quick_power.plan(runs[:1], 0.1, [2 * N], 0.25).to_dict("records")
    assert alone["draws in all"] == alone["images"] * (100 + N)


def test_a_guess_of_the_deviation_replaces_the_pilots(tmp_path, quick_power):
    runs = read_runs([run_with(tmp_path / "1.log", spread_out())])
    guessed, own = (quick_power.plan(runs, 0.02, [N], deviation)["deviation"][0] for deviation in (0.01, None))
    assert guessed == 0.01 < own


def test_a_plan_is_a_function_of_its_seed(tmp_path, quick_power):
    runs = read_runs([run_with(tmp_path / "1.log", spread_out())])
    one, again, other = (quick_power.plan(runs, 0.02, [N], None, seed)["deviation"][0] for seed in (1, 1, 2))
    assert one == again != other


def test_the_deviation_of_few_images_is_that_of_a_sample(tmp_path, quick_power):
    """With n - 1 in the denominator: with n it would be a fifth smaller for three images."""
    runs = read_runs([run_with(tmp_path / "1.log", spread_out(3))])
    planned = quick_power.plan(runs, 0.02, [N], None)["deviation"][0]
    assert planned == pytest.approx(runs[0].log["radius"].std(ddof=1), rel=0.05)


def test_a_width_that_no_data_set_reaches_is_refused(script):
    code, _, err = script("studies/power.py", "--width", 1e-6, "--deviation", 0.25)
    assert code == 2 and "--width 1e-06: no data set has the 9.6e+11 images that it needs" in err
