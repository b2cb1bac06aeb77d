"""What a comparison of experiments says of what its interval leaves out."""

import pytest
from conftest import random_log, with_config

from spacte.report.caveats import of_experiments
from spacte.report.reading import read_runs


def said_of(tmp_path, **sides):
    """The sentences on experiments, given by the trainings of each run's networks."""
    found = []
    for name, runs in sides.items():
        for seed, run in enumerate(runs):
            with_config(random_log(tmp_path / name / f"{seed}.log", 5, seed), run)
        found.append((name, read_runs([tmp_path / name])))
    return " ".join(of_experiments(*found))


def taught(*names, **inputs):
    """A network's training with teachers of these names, and the hashes of its inputs if it has recorded them."""
    return {"teachers": list(names)} | ({"inputs": inputs} if inputs else {})


@pytest.mark.parametrize(
    ("runs", "shared"),
    [
        ([[taught("1.pth")]] * 3, "teachers"),
        ([[taught("1.pth")], [taught("1.pth")], [taught("2.pth")]], None),
        ([[taught("1.pth"), taught("2.pth")]] * 2, None),  # of two networks
        ([[taught("1.pth", teachers=["a"])], [taught("2.pth", teachers=["a"])]], "teachers"),
        ([[taught("1.pth", teachers=["a"])], [taught("1.pth", teachers=["b"])]], None),
        ([[taught("1.pth", teachers=["a"])], [taught("2.pth")]], None),  # whose hash is not known
        ([[{"inputs": {"denoiser": ["a"]}}]] * 2, "denoiser"),
        ([[taught("1.pth", denoiser=["a"])]] * 2, "teachers and denoiser"),
        ([[taught("1.pth")]], None),  # one run shares with none
    ],
)
def test_what_all_trainings_of_an_experiment_took_is_said_and_nothing_else(tmp_path, runs, shared):
    expected = f"All {len(runs)} runs of 'a' took the same {shared}: what another would change is not in the interval."
    for said in said_of(tmp_path / "1", a=runs, b=[[]] * 3), said_of(tmp_path / "2", b=[[]] * 3, a=runs):
        assert (expected in said) == (shared is not None) and said.count("took the same") == (shared is not None)


@pytest.mark.parametrize(
    ("seeds", "names"), [((2, 3), "'a'"), ((3, 2), "'b'"), ((2, 2), "'a' and 'b'"), ((3, 3), None)]
)
def test_the_experiments_of_two_runs_are_named(tmp_path, seeds, names):
    said = said_of(tmp_path, a=[[]] * seeds[0], b=[[]] * seeds[1])
    assert said.startswith(f"The means over {seeds[0]} and {seeds[1]} runs are compared.")
    assert (f"Two runs of {names} tell little" in said) == ("tell little" in said) == (names is not None)


@pytest.mark.parametrize(
    ("alone", "others", "narrow"),
    [([1], [1, 1], True), ([1], [1], False), ([5], [1, 1], True), ([5], [2], False), (None, [1, 1], False)],
)
def test_one_run_borrows_the_variance_of_as_many_networks(tmp_path, alone, others, narrow):
    """Whatever the number of their heads; where it is not known of how many the one run is, nothing is said."""
    one = random_log(tmp_path / "one.log", 5, 0)
    if alone:
        with_config(one, num_heads=alone)
    many = [with_config(random_log(tmp_path / "b" / f"{seed}.log", 5, seed), num_heads=others) for seed in range(3)]
    said = " ".join(of_experiments(("a", read_runs([one])), ("b", read_runs(many))))
    assert ("'a' has fewer networks than those" in said) == narrow
