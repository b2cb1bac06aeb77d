"""The certificate from all the votes, where the truth is known: enumerated, not sampled."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from spacte.certify.certify import check_certificate
from spacte.smooth.bounds import upper_confidence_bound
from spacte.smooth.certificates import ABSTAIN, Certificate, multiclass_certificate
from spacte.smooth.smooth import Smooth
from spacte.utils import UserError

SIGMA = 0.5
GRID = [
    (0.5, 0.5, 0.0), (0.4, 0.4, 0.2), (0.34, 0.33, 0.33), (0.45, 0.44, 0.11), (0.6, 0.4, 0.0), (0.6, 0.2, 0.2),
    (0.3, 0.35, 0.35), (0.2, 0.79, 0.01), (0.9, 0.05, 0.05), (0.9, 0.1, 0.0), (0.98, 0.01, 0.01), (0.05, 0.475, 0.475),
]  # fmt: skip


def outcomes(n):
    """All votes of n draws among three classes."""
    return np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])


def true_radius(p, chosen):
    """Of the claim that the class `chosen` stays: negative where it is not even the largest."""
    other = np.delete(p, chosen).max()
    return SIGMA / 2 * (stats.norm.ppf(p[chosen]) - stats.norm.ppf(other)) if other < 1 else -np.inf


def error_rate(rule, p, n, chosen):
    """P(the radius exceeds the true one), summed over all outcomes of n estimation draws; A is `chosen`."""
    p, votes = np.array(p), outcomes(n)
    law = stats.multinomial.pmf(votes, n, p)
    likely = law > 1e-16
    wrong = [rule(chosen, one) > true_radius(p, chosen) + 1e-12 for one in votes[likely]]
    return float(law[likely] @ wrong)


def all_votes(alpha):
    def radius(chosen, estimation):
        predict, radius = multiclass_certificate(np.eye(3)[chosen], estimation, alpha, SIGMA)
        return -np.inf if predict == ABSTAIN else radius

    return radius


def papers(alpha):
    def radius(chosen, estimation):
        predict, radius = Certificate(alpha, SIGMA)(np.eye(3)[chosen], estimation)
        return -np.inf if predict == ABSTAIN else radius

    return radius


@pytest.mark.parametrize("n", [12, 30])
@pytest.mark.parametrize("certificate", [all_votes, papers])
def test_the_radius_exceeds_the_true_one_with_probability_at_most_alpha(certificate, n):
    """Whichever class was selected, near ties and far from them."""
    alpha = 0.1
    rates = [error_rate(certificate(alpha), p, n, chosen) for p, chosen in itertools.product(GRID, (0, 1))]
    assert max(rates) <= alpha * (1 + 1e-9)
    assert max(rates) > alpha / 20  # it is no certificate that never claims anything


def runner_up_of_the_selection(alpha):
    """What would be wrong: only the class that the selection votes name second is bounded; here it is class 1."""

    def radius(chosen, estimation):
        bound = stats.beta.ppf(alpha / 2, estimation[chosen], estimation.sum() - estimation[chosen] + 1)
        high = upper_confidence_bound(int(estimation[1]), int(estimation.sum()), alpha / 2)
        claims = estimation[chosen] > 0 and bound > high
        return SIGMA / 2 * (stats.norm.ppf(bound) - stats.norm.ppf(high)) if claims else -np.inf

    return radius


def class_of_the_estimation(alpha, p, n):
    """What would be wrong, with Cohen's certificate, too: the class is the one that the estimation votes prefer."""
    votes = outcomes(n)
    law, rate = stats.multinomial.pmf(votes, n, p), 0.0
    for probability, one in zip(law[law > 0], votes[law > 0], strict=True):
        predict, radius = Certificate(alpha, SIGMA)(one, one)
        rate += probability * (predict != ABSTAIN and radius > true_radius(np.array(p), predict) + 1e-12)
    return rate


def test_unsound_rules_are_seen_to_fail():
    """A runner-up taken from the selection votes, and a class taken from the estimation votes, exceed alpha."""
    alpha = 0.1
    assert error_rate(runner_up_of_the_selection(alpha), (0.4, 0.1, 0.5), 30, 0) > 2 * alpha
    assert max(class_of_the_estimation(alpha, (0.5, 0.5, 0.0), n) for n in range(10, 20)) > 1.3 * alpha


def sequential_error_rate(p, n_max, alpha):
    """P(exists n <= n_max: the radius exceeds the true one), exactly: the law of (n_A, n_B), absorbed at errors."""
    truth, wrong = true_radius(np.array(p), 0), 0.0
    alive = {(0, 0): 1.0}
    for n in range(1, n_max + 1):
        reached = {}
        for (a, b), probability in alive.items():
            for step, q in (((1, 0), p[0]), ((0, 1), p[1]), ((0, 0), p[2])):
                key = (a + step[0], b + step[1])
                reached[key] = reached.get(key, 0.0) + probability * q
        alive = {}
        for (a, b), probability in reached.items():
            if probability < 1e-13:
                continue
            predict, radius = multiclass_certificate(np.eye(3)[0], np.array([a, b, n - a - b]), alpha, SIGMA, True)
            if predict != ABSTAIN and radius > truth + 1e-12:
                wrong += probability
            else:
                alive[a, b] = probability
    return wrong


@pytest.mark.parametrize("p", [(0.5, 0.5, 0.0), (0.4, 0.4, 0.2), (0.7, 0.2, 0.1)])
def test_stopping_whenever_one_likes_errs_at_most_at_the_level(p):
    assert 0 < sequential_error_rate(p, 14, 0.3) <= 0.3


def test_two_classes_are_the_papers_certificate():
    for votes in ([90, 10], [100, 0], [45, 55], [0, 100]):
        selection = np.array([1, 0])
        for sequential in (False, True):
            ours = multiclass_certificate(selection, np.array(votes), 0.01, SIGMA, sequential)
            theirs = Certificate(0.01, SIGMA, sequential)(selection, np.array(votes))
            assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], rel=1e-9)


def test_it_is_at_least_the_papers_at_half_the_level_and_certifies_below_one_half():
    selection = np.array([1, 0, 0, 0])
    for votes in ([700, 100, 100, 100], [950, 50, 0, 0], [1000, 0, 0, 0], [501, 499, 0, 0]):
        papers_radius = Certificate(0.0005, SIGMA)(selection, np.array(votes))[1]
        assert multiclass_certificate(selection, np.array(votes), 0.001, SIGMA)[1] >= papers_radius * (1 - 1e-9)
    predict, radius = multiclass_certificate(selection, np.array([400, 200, 200, 200]), 0.001, SIGMA)
    assert predict == 0 and 0.07 < radius < true_radius(np.array([0.4, 0.2, 0.2, 0.2]), 0)


def test_extremes_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        n = 10**7
        for sequential in (False, True):
            for votes in ([n, 0, 0], [0, n, 0], [n - 1, 1, 0], [n // 2, n // 2, 0], [1, 0, 0]):
                for alpha in (0.001, 1e-12, 0.4):
                    _, radius = multiclass_certificate(np.array([1, 0, 0]), np.array(votes), alpha, SIGMA, sequential)
                    assert 0 <= radius < 10


@pytest.mark.parametrize(("selection", "estimation"), [([1], [5]), ([0, 0], [5, 5]), ([1, 0], [0, 0]), ([1], [5, 5])])
def test_votes_that_say_nothing_are_refused(selection, estimation):
    with pytest.raises(ValueError, match="two or more classes"):
        multiclass_certificate(np.array(selection), np.array(estimation), 0.01, SIGMA)


def test_one_class_and_unknown_certificates_are_refused():
    with pytest.raises(UserError, match="needs at least 2 classes: take cohen"):
        check_certificate("all-votes", 1)
    with pytest.raises(ValueError, match="choose from cohen, all-votes"):
        Certificate(0.001, 1.0, kind="best")


def test_smooth_certifies_from_all_votes():
    """Three classes by the noise's first pixel: 2 above 0, 0 and 1 below."""

    def classifier(images):
        first = images[:, 0, 0, 0]
        return torch.stack([first < -0.5, (first >= -0.5) & (first < 0), first >= 0], dim=1).float()

    smooth, x = Smooth(classifier, 3, 0.5), torch.full((1, 2, 2), 0.1)
    found = {
        kind: smooth.certify(x, 50, 1000, 0.001, 500, torch.Generator().manual_seed(0), kind)
        for kind in ("cohen", "all-votes")
    }
    assert found["cohen"][0] == found["all-votes"][0] == 2 and found["all-votes"][1] > found["cohen"][1] > 0
