"""The anytime-valid bound and the rules that stop a count."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from spacte.smooth.bounds import (
    _log_e_value,
    anytime_bound_reaches,
    anytime_lower_bound,
    lower_confidence_bound,
    radius_of,
    upper_confidence_bound,
)
from spacte.smooth.stopping import RadiiDecided, RadiusKnown


def false_certificate_rate(p, n_max, alpha):
    """P(exists n <= n_max: anytime bound > p) under p, exactly: the law of the count, absorbed where the bound errs."""
    alive, wrong = np.array([1.0]), 0.0  # alive[a]: probability of a successes so far and no error yet
    for n in range(1, n_max + 1):
        alive = np.append(alive * (1 - p), 0) + np.append(0, alive * p)
        successes = np.arange(n + 1)
        # where the e-value speaks against p, below the observed rate: there and only there the bound exceeds p
        errs = anytime_bound_reaches(successes, n, p, alpha)
        wrong += alive[errs].sum()
        alive[errs] = 0
    return wrong


@pytest.mark.parametrize("p", [0.5, 0.6915, 0.9, 0.98])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_anytime_bound_errs_at_most_at_its_level_whenever_one_stops(p, alpha):
    """Computed, not sampled: the test cannot fail by chance."""
    rate = false_certificate_rate(p, 1500, alpha)
    assert 0 < rate <= alpha


def test_the_error_is_where_the_bound_exceeds_p():
    """What `false_certificate_rate` absorbs is what the bound itself says, on a grid of counts."""
    for n in (1, 2, 5, 30, 200):
        for p in (0.3, 0.5, 0.9, 0.97):
            successes = np.arange(n + 1)
            bounds = anytime_lower_bound(successes, n, 0.05)
            assert np.array_equal(bounds > p, anytime_bound_reaches(successes, n, p, 0.05))


def test_long_streams_err_at_most_at_their_level():
    """4,000 Bernoulli streams of 100,000 draws at the hardest p for radius 0, looked at 100 times, alpha 0.01.

    More than 85 false certificates have probability below 1e-6 (binomial tail at the level itself).
    """
    streams, alpha, p = 4000, 0.01, 0.5
    rng, looks = np.random.default_rng(0), np.unique(np.geomspace(10, 100_000, 100).astype(int))
    votes, wrong = np.zeros(streams, dtype=int), np.zeros(streams, dtype=bool)
    for n, more in zip(looks, np.diff(looks, prepend=0), strict=True):
        votes += rng.binomial(more, p, streams)
        wrong |= anytime_bound_reaches(votes, n, p, alpha)
    assert stats.binom.sf(85, streams, alpha) < 1e-6
    assert wrong.sum() <= 85


def test_the_e_value_crosses_its_threshold_once():
    """Step 3 of the proof, on a grid: below A/n the e-value is convincing up to one point and not beyond."""
    for n in [*range(1, 13), 100, 1000]:
        for n_a in range(1, n + 1) if n < 13 else (1, n // 2, n - 1, n):
            p = np.linspace(0, n_a / n, 2002)[1:-1]
            for alpha in (0.47, 0.05, 0.001):
                convincing = _log_e_value(n_a, n, p) >= -math.log(alpha)
                assert np.count_nonzero(np.diff(convincing.astype(int))) <= 1 and not convincing[-1]


def test_a_fixed_number_of_draws_is_bounded_better_by_clopper_pearson():
    for n in (10, 1000, 100_000):
        for n_a in (0, n // 2, n - n // 100, n):
            assert anytime_lower_bound(n_a, n, 0.001) <= lower_confidence_bound(n_a, n, 0.001)


def test_all_of_100000_votes_give_nearly_clopper_pearsons_radius():
    ratio = radius_of(anytime_lower_bound(100_000, 100_000, 0.001), 1) / radius_of(
        lower_confidence_bound(100_000, 100_000, 0.001), 1
    )
    assert ratio == pytest.approx(0.990, abs=5e-4)


def test_numbers_and_arrays_agree_and_the_bound_grows_with_the_votes():
    votes = np.arange(0, 1001, 50)
    bounds = anytime_lower_bound(votes, 1000, 0.001)
    assert bounds.tolist() == [anytime_lower_bound(int(a), 1000, 0.001) for a in votes]
    assert isinstance(anytime_lower_bound(7, 10, 0.1), float) and bounds[0] == 0
    assert np.all(np.diff(bounds) >= 0) and np.all(bounds[1:] < votes[1:] / 1000)
    assert anytime_lower_bound(90, 100, 0.01) < anytime_lower_bound(90, 100, 0.05)


@pytest.mark.parametrize(("n_a", "n"), [(5, 4), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(n_a, n):
    with pytest.raises(ValueError, match="0 <= n_a <= n"):
        anytime_lower_bound(n_a, n, 0.01)
    with pytest.raises(ValueError, match="0 <= n_a <= n"):
        lower_confidence_bound(n_a, n, 0.01)


def test_radii_are_decided_where_certified_or_hopeless():
    rule = RadiiDecided([0.0, 0.5], n_max=100_000, alpha=0.001, sigma=0.5)  # p_A of 0.5 and 0.841
    assert not rule.enough(60, 100)  # undecided between the two
    assert rule.enough(6000, 10_000)  # radius 0 certified, 0.5 given up
    assert rule.enough(1000, 1000) and rule.enough(400, 1000)  # both certified; both given up
    assert not rule.enough(841, 1000)  # at the border of 0.5
    assert rule.enough(np.array([6000, 8413]), 10_000).tolist() == [True, False]
    assert rule.votes[0] > 50_000 and anytime_lower_bound(rule.votes[1], 100_000, 0.001) >= rule.needed[1]


def test_a_tolerance_is_met_by_the_bounds_on_both_sides():
    rule = RadiusKnown(0.05, n_max=100_000, alpha=0.001, sigma=0.5)
    assert not rule.enough(900, 1000) and rule.enough(90_000, 100_000)
    assert rule.enough(300, 1000)  # below 1/2: nothing to be known
    assert not rule.enough(1000, 1000) and rule.enough(80_000, 80_000)  # all votes: at most what N of them certify


def test_bounds_of_a_fixed_number_of_draws_are_statsmodels():
    rng = np.random.default_rng(0)
    for alpha, most in itertools.product((1e-9, 0.0005, 0.01, 0.3), (1, 5, 1000, 10_000_000)):
        n = rng.integers(1, most + 1, 50)
        votes = (rng.random(50) * (n + 1)).astype(int)
        low, high = proportion_confint(votes, n, alpha=2 * alpha, method="beta")
        ours = [lower_confidence_bound(int(k), int(draws), alpha) for k, draws in zip(votes, n, strict=True)]
        assert ours == pytest.approx(low.tolist(), rel=1e-12)
        assert upper_confidence_bound(votes, n, alpha) == pytest.approx(high, rel=1e-12)
        assert upper_confidence_bound(int(votes[0]), int(n[0]), alpha) == pytest.approx(high[0], rel=1e-12)


def test_an_e_value_that_rounding_alone_lifts_over_its_threshold_convinces_nobody():
    log_e = float(_log_e_value(90, 100, 0.8))
    assert not anytime_bound_reaches(90, 100, 0.8, math.exp(-(log_e - 5e-10)))
    assert anytime_bound_reaches(90, 100, 0.8, math.exp(-(log_e - 1e-8)))


def test_above_a_level_of_47_percent_the_bound_stays():
    """Step 4 of the proof: above it the e-value may cross its threshold twice."""
    votes = np.arange(0, 21)
    assert np.array_equal(anytime_lower_bound(votes, 20, 0.9), anytime_lower_bound(votes, 20, 0.47))


def test_the_bound_is_the_last_number_that_the_votes_reach():
    """From below, to the last digits."""
    for n in (1, 2, 5, 30, 200, 10_000):
        votes = np.unique(np.linspace(1, n, 50).astype(int))
        bounds = anytime_lower_bound(votes, n, 0.05)
        assert anytime_bound_reaches(votes, n, bounds, 0.05).all()
        assert not anytime_bound_reaches(votes, n, bounds * (1 + 1e-12), 0.05).any()


def test_a_bound_of_one_half_is_a_radius_of_0():
    assert radius_of(0.5, 1.0) == 0.0 and radius_of(np.nextafter(0.5, 0), 1.0) is None
