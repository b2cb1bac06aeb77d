"""How often an interval leaves out the true difference."""

import numpy as np
import pytest
from scipy import stats

from spacte.report.intervals import accuracy_interval, experiments_interval, holm, interval_over_seeds

SAMPLES = 40_000
FAILURE = 1e-7  # of each of these tests, where the interval's error is the one that it tolerates


def misses(interval):
    """In how many of the samples the interval leaves 0 out; the p-value says the same."""
    outside = (interval.low > 0) | (interval.high < 0)
    known = ~np.isnan(interval.low)
    assert np.array_equal(outside[known], interval.p[known] < 0.05)
    return int(outside.sum())


def normal(rng, images):
    return rng.normal(size=(SAMPLES, images))


def half_zero(rng, images):
    """Half of the images agree; a quarter gain little, and exponentially much, a quarter lose 0.2 and more: mean 0."""
    which, size = rng.random((SAMPLES, images)), (SAMPLES, images)
    differ = np.where(which < 0.75, rng.exponential(0.3, size), -0.2 - rng.exponential(0.1, size))
    return np.where(which < 0.5, 0, differ)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("draw", "images", "tolerated"),
    [(normal, 10, 0), (normal, 50, 0.05), (normal, 500, 0.05), (half_zero, 20, 0), (half_zero, 100, 0.06)],
)
def test_the_acrs_interval_holds_its_level(draw, images, tolerated):
    """The type I error: no more than tolerated, and none where there are too few images for a verdict."""
    found = experiments_interval(draw(np.random.default_rng(0), images)[:, None], np.zeros((1, 1, 1)))
    assert misses(found) <= stats.binom.isf(FAILURE, SAMPLES, tolerated)
    assert np.isnan(found.low).all() == (tolerated == 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [10, 20, 50, 500])
@pytest.mark.parametrize("differ", [0.02, 0.2])
def test_an_accuracys_interval_holds_its_level(images, differ):
    """Two classifiers of one accuracy, right and wrong on different images: the type I error is at most 5 %."""
    which = np.random.default_rng(0).random((SAMPLES, images))
    found = accuracy_interval(which < differ / 2, which > 1 - differ / 2)
    assert misses(found) <= stats.binom.isf(FAILURE, SAMPLES, 0.05)


def test_an_accuracys_interval_is_the_published_one():
    """Bonett and Price's formula, by hand: of 30 images 7 are right under a alone, 2 under b alone."""
    a = np.arange(30) < 20
    b = (np.arange(30) < 13) | (np.arange(30) >= 28)
    found = accuracy_interval(a[None], b[None])
    error = ((8 / 32 + 3 / 32 - (5 / 32) ** 2) / 32) ** 0.5
    assert found.low == pytest.approx(5 / 32 - 1.959964 * error) and found.high == pytest.approx(
        5 / 32 + 1.959964 * error
    )
    assert found.p == pytest.approx(2 * stats.norm.sf(5 / 32 / error))


@pytest.mark.parametrize("effects", [(1, 0, 0.3), (0.5, 0.1, 0.5), (0, 0.3, 0.5), (1, 0.05, 0), (1, 0.3, 0)])
@pytest.mark.parametrize(
    ("seeds", "tolerated"),
    [((5, 5), 0.054), ((5, 3), 0.054), ((2, 2), 0.073), ((2, 5), 0.073), ((1, 5), 0.059), ((3, 1), 0.078)],
)
def test_an_experiments_interval_holds_its_level(effects, seeds, tolerated):
    """Equal experiments, other images and seeds each time: the type I error is as documented.

    The effects are the deviations of what belongs to the image (it favours one side), to the seed, and to both.
    """
    rng, experiments, images = np.random.default_rng(0), 10_000, 100
    of_image, of_seed, of_both = effects
    sides = []
    for number in seeds:
        by_seed = rng.normal(size=(experiments, number, 1)) * of_seed
        sides.append(by_seed + rng.normal(size=(experiments, number, images)) * of_both)
    sides[0] += rng.normal(size=(experiments, 1, images)) * of_image
    errors = misses(experiments_interval(*sides))
    assert errors <= stats.binom.isf(FAILURE, experiments, tolerated)
    if of_both <= 0.3 and min(seeds) > 1:
        assert errors >= 0.02 * experiments, "nor is it so wide that it says nothing"


@pytest.mark.parametrize(("only_a", "only_b"), [(0.01, 0), (0.02, 0), (0.07, 0.03)])
def test_an_experiments_interval_of_an_accuracy_holds_its_level_where_few_images_differ(only_a, only_b):
    """Of 500 images one experiment is right on some, in nine of ten runs, that the other is wrong on."""
    rng, experiments = np.random.default_rng(0), 4000
    missed = 0
    for _ in range(experiments // 100):
        which = rng.random((100, 1, 500))
        sides = [one & (rng.random((100, 5, 500)) < 0.9) for one in (which < only_a, which > 1 - only_b)]
        found = experiments_interval(*(side.astype(float) for side in sides), proportions=True)
        difference = (only_a - only_b) * 0.9
        missed += int(((found.low > difference) | (found.high < difference)).sum())
    assert missed <= stats.binom.isf(FAILURE, experiments, 0.05)


def test_the_interval_over_seeds_holds_its_level():
    """Of paired differences, what a vote adds to its members say: images and seeds vary, the mean is 0."""
    rng, experiments, missed = np.random.default_rng(0), 4000, 0
    for _ in range(experiments):
        low, high = interval_over_seeds(
            rng.normal(size=(5, 1)) * 0.2 + rng.normal(size=(1, 60)) + rng.normal(size=(5, 60))
        )
        missed += low > 0 or high < 0
    assert 0.02 * experiments <= missed <= stats.binom.isf(FAILURE, experiments, 0.06)


def test_two_runs_of_images_alone_are_compared_as_by_the_paired_t():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 1, 300))
    found, reference = experiments_interval(a, b), stats.ttest_rel(a[0, 0], b[0, 0])
    interval = reference.confidence_interval()
    assert (*found.low, *found.high, *found.p) == pytest.approx((interval.low, interval.high, reference.pvalue))


def test_one_run_against_two_has_no_interval():
    """Two seeds do not tell how much a third would differ: with one degree of freedom the level is not held."""
    one, two = np.random.default_rng(0).normal(size=(1, 1, 300)), np.random.default_rng(1).normal(size=(1, 2, 300))
    for found in (experiments_interval(one, two), experiments_interval(two, one)):
        assert np.isnan([found.low, found.high, found.p]).all()


def test_holms_p_values():
    """By hand: the smallest of three times 3, the next times 2 and no less than the one before; NaN is not counted."""
    found = holm(np.array([0.04, np.nan, 0.01, 0.03]))
    assert found == pytest.approx([0.06, np.nan, 0.03, 0.06], nan_ok=True)
    assert np.isnan(holm(np.full(2, np.nan))).all()


def test_two_seeds_that_differ_widen_the_interval():
    images = np.random.default_rng(0).normal(size=(1, 60))
    one, two = (np.diff(interval_over_seeds(images + of_seed)) for of_seed in (0.0, np.array([[1.0], [-1.0]])))
    assert two > 2 * one


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("different", [49, 50])
def test_the_interval_over_seeds_needs_fifty_images_that_differ_on_average_over_them(seeds, different):
    differences = np.random.default_rng(0).normal(size=(seeds, 80))
    differences[:, different:] = 0
    assert np.isnan(interval_over_seeds(differences)).all() == (different < 50)


def test_three_seeds_tell_how_a_single_run_varies():
    rng = np.random.default_rng(0)
    one, three = rng.normal(size=(1, 1, 300)), rng.normal(size=(1, 3, 300))
    for found in (experiments_interval(one, three), experiments_interval(three, one)):
        assert np.isfinite([found.low, found.high, found.p]).all()


def test_an_accuracys_interval_ends_at_1():
    right, wrong = np.ones((1, 3), bool), np.zeros((1, 3), bool)
    assert accuracy_interval(right, wrong).high == 1 and accuracy_interval(wrong, right).low == -1
