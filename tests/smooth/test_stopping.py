"""The rules that stop a count decide as the radii themselves would, which they do not compute."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from spacte.smooth.bounds import anytime_lower_bound
from spacte.smooth.certificates import Certificate
from spacte.smooth.stopping import AllVotesDecided, RadiiDecided, RadiusKnown

N, ALPHA, SIGMA, GIVE_UP = 100_000, 0.001, 0.5, 0.01
TABLE = np.arange(0, 1.8, 0.25)
ALL_VOTES = Certificate(ALPHA, SIGMA, True, "all-votes")


@pytest.mark.parametrize(("give_up", "enough"), [(0.01, False), (0.5, True)])
def test_a_larger_give_up_gives_a_radius_up_sooner(give_up, enough):
    """830 votes of 1,000, where .841 are needed: at .01 the upper bound is .856, at .5 the share itself."""
    assert RadiiDecided([0.5], N, ALPHA, SIGMA, give_up).enough(830, 1000) == enough


def votes_of(count, classes=10, seed=0):
    """Votes [count, classes] of 1 to N draws, class 0 the selected one, of images of all kinds."""
    rng = np.random.default_rng(seed)
    draws = np.exp(rng.uniform(0, np.log(N), count)).astype(int)
    easy = np.where(rng.random(count) < 0.5, rng.random(count), 1 - 10 ** -rng.uniform(0, 6, count))
    others = rng.dirichlet(np.full(classes - 1, 0.3), count) * (1 - easy)[:, None]
    return rng.multinomial(draws, np.column_stack([1 - others.sum(1), others]))


def clopper_pearson(votes, n):
    return proportion_confint(votes, n, alpha=2 * GIVE_UP, method="beta")


def radii_of(certificate, n_a, n_b, n, classes):
    """The radii, -1 for none, written again for arrays."""
    if certificate.kind == "cohen" or classes == 2:
        low = anytime_lower_bound(n_a, n, ALPHA)
        return np.where(low < 0.5, -1, SIGMA * stats.norm.ppf(low))
    low = anytime_lower_bound(n_a, n, ALPHA / 2)
    high = np.minimum(1 - low, 1 - anytime_lower_bound(n - n_b, n, ALPHA / 2))
    return np.where(low > high, SIGMA / 2 * (stats.norm.ppf(low) - stats.norm.ppf(high)), -1)


def now_and_hoped(certificate, estimation):
    n, n_a, n_b = estimation.sum(1), estimation[:, 0], estimation[:, 1:].max(1)
    hoped_a = np.minimum(N, n_a + (N - n) * clopper_pearson(n_a, n)[1])
    hoped_b = np.minimum(n_b + (N - n) * clopper_pearson(n_b, n)[0], N - hoped_a)
    classes = estimation.shape[1]
    return radii_of(certificate, n_a, n_b, n, classes), radii_of(certificate, hoped_a, hoped_b, N, classes)


def decisions(rule, estimation):
    selection = np.eye(estimation.shape[1], dtype=int)[0]
    return [rule(selection, one) for one in estimation]


@pytest.mark.parametrize(("kind", "classes"), [("all-votes", 10), ("all-votes", 3), ("all-votes", 2), ("cohen", 10)])
def test_radii_are_decided_as_the_radii_themselves_say(kind, classes):
    certificate, estimation = Certificate(ALPHA, SIGMA, True, kind), votes_of(1000, classes)
    now, hoped = now_and_hoped(certificate, estimation)
    expected = ((now[:, None] >= TABLE) | (hoped[:, None] < TABLE)).all(1)
    assert decisions(AllVotesDecided(certificate, N, TABLE), estimation) == expected.tolist()
    assert 0.1 < expected.mean() < 0.9


def test_a_single_class_is_decided_once_its_votes_certify_the_radii():
    """There is no other class to bound."""
    estimation = np.array([[100], [1000], [N]])
    now = radii_of(ALL_VOTES, estimation[:, 0], np.zeros(3, int), estimation[:, 0], 1)
    radius = (now[0] + now[1]) / 2
    assert decisions(AllVotesDecided(ALL_VOTES, N, [radius]), estimation) == [False, True, True]


@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_a_tolerance_is_met_as_the_radii_themselves_say(tolerance):
    estimation = votes_of(1000)
    now, hoped = now_and_hoped(ALL_VOTES, estimation)
    expected = (hoped < 0) | (hoped - np.maximum(now, 0) <= tolerance)
    assert decisions(AllVotesDecided(ALL_VOTES, N, tolerance=tolerance), estimation) == expected.tolist()
    assert 0.1 < expected.mean() < 0.9


@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_the_papers_radius_is_known_as_its_bounds_say(tolerance):
    estimation = votes_of(1000)
    n_a, n, rule = estimation[:, 0], estimation.sum(1), RadiusKnown(tolerance, N, ALPHA, SIGMA)
    upper = np.minimum(clopper_pearson(n_a, n)[1], anytime_lower_bound(N, N, ALPHA))
    lower = np.maximum(anytime_lower_bound(n_a, n, ALPHA), 0.5)
    expected = (upper < 0.5) | (SIGMA * stats.norm.ppf(upper) - SIGMA * stats.norm.ppf(lower) <= tolerance)
    assert [rule.enough(int(a), int(draws)) for a, draws in zip(n_a, n, strict=True)] == expected.tolist()
    assert 0.1 < expected.mean() < 0.9


def test_the_papers_radii_are_decided_as_their_bounds_say():
    estimation = votes_of(1000)
    n_a, n = estimation[:, 0], estimation.sum(1)
    needed = stats.norm.cdf(TABLE / SIGMA)
    hoped = np.floor(n_a + (N - n) * clopper_pearson(n_a, n)[1])
    certified = anytime_lower_bound(n_a, n, ALPHA)[:, None] >= needed
    missed = anytime_lower_bound(hoped, N, ALPHA)[:, None] < needed
    expected = (certified | missed).all(1)
    assert decisions(RadiiDecided(TABLE, N, ALPHA, SIGMA, GIVE_UP), estimation) == expected.tolist()
    assert 0.1 < expected.mean() < 0.9


def test_a_radius_that_no_votes_reach_is_given_up_at_once():
    assert RadiiDecided([9.0], 1000, ALPHA, SIGMA).enough(100, 100)


def test_a_radius_that_is_met_to_the_last_bit_is_certified_and_not_given_up():
    """The border itself: no bracket can tell, the radius does."""
    estimation, met = votes_of(60, seed=1), 0
    for one, now, hoped in zip(estimation, *now_and_hoped(ALL_VOTES, estimation), strict=True):
        if 0 < now < hoped:
            met += 1
            for radius, expected in ((now, True), (np.nextafter(now, 9), False), (hoped, False)):
                assert decisions(AllVotesDecided(ALL_VOTES, N, [radius]), one[None]) == [expected]
            assert decisions(AllVotesDecided(ALL_VOTES, N, [np.nextafter(hoped, 9)]), one[None]) == [True]
    assert met > 10


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("kind", ["cohen", "all-votes"])
@pytest.mark.parametrize("sequential", [False, True])
def test_brackets_hold_the_radius_and_end_at_it(kind, sequential, classes):
    certificate, estimation = Certificate(ALPHA, SIGMA, sequential, kind), votes_of(100, classes)
    votes = estimation[:, 0], estimation[:, 1:].max(1), estimation.sum(1)
    radii = [certificate.radius(*map(int, one), classes) for one in zip(*votes, strict=True)]
    brackets = list(certificate.radius_brackets(*votes, classes))
    none = np.array([radius is None for radius in radii])
    known = np.array([-1.0 if radius is None else radius for radius in radii])
    for least, most in brackets:
        assert np.all((least <= known)[~none]) and np.all((most >= known)[~none]) and np.all(least[none] < 0)
    assert all(np.array_equal(end, known) for end in brackets[-1])
    if sequential:
        least, most = brackets[-2]
        assert np.all(most[~none] - least[~none] < 1e-6) and none.any() and not none.all()
