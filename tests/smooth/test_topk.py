"""Top-k certificates where the truth is known: probabilities enumerated, and classifiers that can be moved exactly."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from spacte.smooth.bounds import lower_confidence_bound, upper_confidence_bound
from spacte.smooth.certificates import ABSTAIN, Certificate
from spacte.smooth.topk import TopK, robust_radii

SIGMA, ALPHA = 0.5, 0.1
GRID = [  # class 0 is certified: near the border of the two most probable ones, and far from it
    (0.25, 0.25, 0.25, 0.25), (0.3, 0.35, 0.3, 0.05), (0.2, 0.5, 0.2, 0.1), (0.2, 0.3, 0.26, 0.24),
    (0.9, 0.05, 0.05, 0), (0.34, 0.33, 0.33, 0), (0.05, 0.9, 0.05, 0), (0.1, 0.45, 0.45, 0), (0.6, 0.4, 0, 0),
]  # fmt: skip


def outcomes(n, classes):
    """All votes of n draws."""
    rows = itertools.combinations(range(n + classes - 1), classes - 1)  # stars and bars
    return np.array([np.diff([-1, *bars, n + classes - 1]) - 1 for bars in rows])


def true_radius(p, k):
    """Jia et al.'s, by another solver; negative where class 0 is not among the k most probable."""
    strongest = sorted(p[1:], reverse=True)[:k]
    found = [-1.0]
    for t in range(1, k + 1):
        a, b = stats.norm.ppf([p[0], sum(strongest[k - t :])])
        if t * p[0] > sum(strongest[k - t :]):

            def gap(z, a=a, b=b, t=t):
                return t * stats.norm.cdf(a - z) - stats.norm.cdf(b + z)

            found.append(np.inf if np.isinf(b) else optimize.brentq(gap, 0, 20))
    return SIGMA * max(found)


def error_rate(rule, p, n, k):
    """P(the radius exceeds the true one), summed over all outcomes of n draws."""
    votes, truth = outcomes(n, len(p)), true_radius(p, k)
    law = stats.multinomial.pmf(votes, n, p)
    likely = law > 1e-16
    wrong = [rule(one) > truth + 1e-12 for one in votes[likely]]
    return float(law[likely] @ wrong)


def certificate(kind, k):
    def radius(votes):
        chosen, radius = TopK(ALPHA, SIGMA, k, kind=kind)(0, votes)
        return -np.inf if chosen == ABSTAIN else radius

    return radius


def test_alpha_is_shared_out_among_the_bounds_as_the_proof_says():
    """Of which outcomes' enumeration sees little, for the bounds rarely fail together: half of alpha is p_A's, the rest
    is divided by k and by the number of sums of t of the k strongest others.
    """
    votes, k, n = np.array([3000, 2500, 2000, 1500, 600, 400]), 3, 10_000
    low = lower_confidence_bound(3000, n, ALPHA / 2)
    sums = [(1, 1500), (2, 3500), (3, 6000)]
    highs = [upper_confidence_bound(together, n, ALPHA / (2 * k * math.comb(k, t))) for t, together in sums]
    expected = SIGMA * robust_radii(low, np.array(highs), np.array([1, 2, 3])).max()
    assert TopK(ALPHA, SIGMA, k, kind="all-votes")(0, votes)[1] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cohen", "all-votes"])
@pytest.mark.parametrize(("k", "n"), [(2, 8), (2, 16), (3, 12)])
def test_the_radius_exceeds_the_true_one_with_probability_at_most_alpha(kind, k, n):
    rates = [error_rate(certificate(kind, k), p, n, k) for p in GRID]
    assert max(rates) <= ALPHA * (1 + 1e-9)
    assert max(rates) > ALPHA / 200  # it is no certificate that never claims anything


def test_no_sum_of_others_is_more_probable_than_what_is_left():
    """All other votes are for the two strongest: the bound at the smaller level is the looser one."""
    n, alpha = 1000, 0.1
    for n_a in (400, 700):
        low = lower_confidence_bound(n_a, n, alpha / 2)
        others = [(n - n_a) // 2] * 2
        strongest, both = upper_confidence_bound(others[0], n, alpha / 8), upper_confidence_bound(n - n_a, n, alpha / 4)
        assert both > 1 - low > strongest
        expected = 0.5 * robust_radii(low, np.array([strongest, 1 - low]), np.array([1, 2])).max()
        found = TopK(alpha, 0.5, 2, kind="all-votes")(0, np.array([n_a, *others]))[1]
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_level_is_shared_out_for_a_reason():
    """The weaker of the two strongest others is no fixed class: its bound errs nearly twice as often as that of one."""
    votes, p = outcomes(30, 3), (0.4, 0.3, 0.3)
    law = stats.multinomial.pmf(votes, 30, p)
    fixed, weaker = (law @ [upper_confidence_bound(int(n), 30, ALPHA / 2) < 0.3 for n in of]
                     for of in (votes[:, 1], votes[:, 1:].min(axis=1)))  # fmt: skip
    assert 0 < 1.8 * fixed < weaker <= 2 * fixed


def moved(p_of_shift, k, radius):
    """Whether class 0 is among the k most probable at all shifts below the radius."""
    for shift in np.linspace(-1, 1, 41) * radius * 0.9999:
        p = p_of_shift(shift)
        if (p[1:] >= p[0] - 1e-12).sum() >= k:
            return False
    return True


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_robust_radius_holds_for_classifiers_that_are_intervals_of_a_line(k):
    """Five classes, each some intervals: their probabilities at any shift are differences of Phi."""
    generator, claimed = np.random.default_rng(k), 0
    for _ in range(150):
        borders = np.sort(generator.normal(0, SIGMA, 11))
        owner = np.concatenate([generator.permutation(5), generator.integers(0, 5, 7)])

        def p_of_shift(shift, borders=borders, owner=owner):
            law = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], borders - shift, [np.inf]]) / SIGMA))
            return np.bincount(owner, law, 5)

        p = p_of_shift(0.0)
        strongest = np.sort(p[1:])[::-1][:k]
        sums = np.array([strongest[k - t :].sum() for t in range(1, k + 1)])
        z = robust_radii(p[0], sums, np.arange(1, k + 1)).max()
        if z > 0:
            claimed += 1
            assert moved(p_of_shift, k, SIGMA * z)
    assert claimed > 10


def test_the_robust_radius_is_reached():
    """Class 0 below a border, the two others share what is above it alike: one step further and it is the third."""
    p_a = 0.4
    a, b = stats.norm.ppf([p_a, 1 - p_a])
    z = robust_radii(p_a, np.array([1 - p_a]), np.array([2]))[0]
    share = stats.norm.cdf(b + z) / 2
    assert stats.norm.cdf(a - z) == pytest.approx(share, abs=1e-9)  # as large as each of the two, there


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", ["cohen", "all-votes"])
def test_top_1_is_the_certificate_of_one_class(kind, sequential):
    for votes in ([700, 100, 100, 100], [400, 200, 200, 200], [950, 50, 0, 0], [501, 499, 0, 0], [0, 1000, 0, 0]):
        one, votes = Certificate(0.001, SIGMA, sequential, kind), np.array(votes)
        chosen, radius = TopK(0.001, SIGMA, 1, sequential, kind)(0, votes)
        expected = one(np.array([1, 0, 0, 0]), votes)
        assert chosen == expected[0] and radius == pytest.approx(expected[1], abs=1e-9)


def test_more_places_and_more_votes_certify_more():
    votes = np.array([3000, 2500, 2000, 1500, 600, 400])
    for kind in ("cohen", "all-votes"):
        radii = [TopK(0.001, SIGMA, k, kind=kind)(0, votes)[1] for k in (1, 2, 3, 5)]
        assert radii == sorted(radii) and radii[-1] > radii[1]
    fixed, anytime = (TopK(0.001, SIGMA, 3, sequential, "all-votes")(0, votes)[1] for sequential in (False, True))
    assert 0 < anytime < fixed < true_radius(votes / 10_000, 3)


def sequential_error_rate(p, k, n_max, alpha):
    """P(exists n <= n_max: the radius exceeds the true one), exactly: the law of the votes, absorbed at errors."""
    truth, wrong, alive = true_radius(np.array(p), k), 0.0, {(0,) * len(p): 1.0}
    for _ in range(n_max):
        reached = {}
        for votes, probability in alive.items():
            for c, q in enumerate(p):
                key = (*votes[:c], votes[c] + 1, *votes[c + 1 :])
                reached[key] = reached.get(key, 0.0) + probability * q
        alive = {}
        for votes, probability in reached.items():
            chosen, radius = TopK(alpha, SIGMA, k, True, "all-votes")(0, np.array(votes))
            if chosen != ABSTAIN and radius > truth + 1e-12:
                wrong += probability
            else:
                alive[votes] = probability
    return wrong


@pytest.mark.parametrize("p", [(0.3, 0.4, 0.3), (0.34, 0.33, 0.33), (0.2, 0.4, 0.4)])
def test_stopping_whenever_one_likes_errs_at_most_at_the_level(p):
    assert 0 < sequential_error_rate(p, 2, 9, 0.5) <= 0.5


def test_what_says_nothing_is_refused():
    with pytest.raises(ValueError, match="top 3 of 3 classes says nothing"):
        TopK(0.001, SIGMA, 3)(0, np.array([5, 4, 3]))
    with pytest.raises(ValueError, match="k must be at least 1"):
        TopK(0.001, SIGMA, 0)
    assert TopK(0.001, SIGMA, 2)(0, np.zeros(4, int)) == (ABSTAIN, 0.0)
