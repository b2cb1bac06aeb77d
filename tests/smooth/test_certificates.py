"""Bounds, certificates and predictions from given votes: the authors' numbers, and exact levels."""

import numpy as np
import pytest
from conftest import golden
from scipy import stats

from spacte.smooth import certificates
from spacte.smooth.bounds import lower_confidence_bound, radius_of
from spacte.smooth.certificates import ABSTAIN, Certificate, fewest_deciding_votes, prediction


@pytest.mark.parametrize("case", golden("losses")["certify_cases"])
def test_bounds_and_radii_are_the_authors(case):
    p_lower = lower_confidence_bound(case["n_a"], case["n"], case["alpha"])
    assert p_lower == pytest.approx(case["p_lower"], rel=1e-5)
    radius = radius_of(p_lower, case["sigma"])
    assert radius is None if case["radius"] is None else radius == pytest.approx(case["radius"], rel=1e-4)


@pytest.mark.parametrize("n", [10, 100, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_lower_bound_covers_exactly(n, alpha):
    """P(bound > p) summed over the binomial distribution, without sampling: at most alpha for every p."""
    bounds = np.array([lower_confidence_bound(k, n, alpha) for k in range(n + 1)])
    for p in [0.01, 0.3, 0.5, 0.777, 0.9, 0.99, 0.9999, *(bounds[1:] * (1 - 1e-12))]:
        assert stats.binom.pmf(np.arange(n + 1), n, p)[bounds > p].sum() <= alpha * (1 + 1e-6)


def test_the_largest_radius_needs_all_votes():
    rule = Certificate(0.001, 1.0)
    assert rule.radius(100_000, 0, 100_000, 10) == pytest.approx(3.811, abs=5e-3)
    assert rule.radius(9, 0, 9, 10) is None and rule.radius(10, 0, 10, 10) is not None


@pytest.mark.parametrize("n", [11, 30, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_a_prediction_at_the_border_has_at_most_its_level(n, alpha):
    """Exactly: summed over what n votes for one of two classes of probability 1/2 may be."""
    law = stats.binom.pmf(np.arange(n + 1), n, 0.5)
    answered = [prediction(np.array([k, n - k]), alpha) != ABSTAIN for k in range(n + 1)]
    assert alpha / 10 < law @ answered <= alpha


def test_the_bound_uses_the_estimation_draws_only():
    """Selection picks the class, even where estimation prefers another."""
    rule = Certificate(0.001, 1.0)
    assert rule(np.array([60, 40]), np.array([100, 900])) == (ABSTAIN, 0.0)
    predict, radius = rule(np.array([40, 60]), np.array([100, 900]))
    assert predict == 1 and radius == pytest.approx(stats.norm.ppf(stats.beta.ppf(0.001, 900, 101)))


def test_what_selection_found_wrong_keeps_the_class_and_claims_nothing():
    assert Certificate(0.001, 0.5)(np.array([3, 97]), np.zeros(2, int)) == (1, 0.0)


def test_an_alpha_of_1_is_no_certificate():
    for kind in ("cohen", "all-votes"):
        with pytest.raises(ValueError, match=r"alpha 1\.0: it must be below 1"):
            Certificate(1.0, 0.5, kind=kind)


@pytest.mark.parametrize("alpha", [0.5, 0.25, 0.1, 0.001, 2.0**-20])
def test_the_fewest_votes_that_decide_do_and_one_less_does_not(alpha):
    n = fewest_deciding_votes(alpha)
    assert prediction(np.array([n, 0]), alpha) == 0 and prediction(np.array([n - 1, 0]), alpha) == ABSTAIN


def test_prediction_compares_the_two_best():
    assert prediction(np.array([5, 90, 5]), 0.001) == 1
    assert prediction(np.array([45, 55, 0]), 0.001) == ABSTAIN


def test_radii_are_remembered_by_certificate_and_votes(monkeypatch):
    asked, real = [], certificates.lower_confidence_bound
    monkeypatch.setattr(certificates, "lower_confidence_bound", lambda *one: asked.append(one) or real(*one))
    Certificate.radius.cache_clear()
    votes = [(Certificate(alpha, sigma), n_a) for alpha in (0.001, 0.01) for sigma in (0.5, 1.0) for n_a in (80, 90)]
    radii = [[rule.radius(n_a, 5, 100, 10) for rule, n_a in votes] for _ in range(2)]
    assert len(asked) == 8 == len(set(radii[0])) and radii[0] == radii[1]
