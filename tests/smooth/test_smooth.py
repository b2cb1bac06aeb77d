"""The certificate where the truth is known: on a linear classifier p_A and the distance to the boundary are exact."""

import math
import textwrap

import numpy as np
import pytest
import torch
from scipy import special, stats

from spacte.model.passes import FixedPasses
from spacte.smooth.bounds import lower_confidence_bound
from spacte.smooth.certificates import ABSTAIN, Certificate, multiclass_certificate
from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import VoteRequest
from spacte.utils import RunError


class HalfSpace(torch.nn.Module):
    """Class 1 where w.x > 0, otherwise 0: under noise p_1 = Phi(d / sigma), where d = w.x / |w| is the distance."""

    def __init__(self, shape):
        super().__init__()
        self.w = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def forward(self, images):
        score = (images * self.w).flatten(1).sum(1)
        return torch.stack([-score, score], dim=1).unsqueeze(0)  # [1, N, 2]

    def at_distance(self, distance):
        return self.w / self.w.norm() * distance


def test_votes_follow_the_known_probability():
    """40,000 votes are within 6 standard deviations of p_A = Phi(distance / sigma) (P < 1e-8)."""
    model, sigma, n = HalfSpace((1, 4, 4)), 0.5, 40_000
    counts = Smooth(model, 2, sigma).count_votes(model.at_distance(0.3), n, 1000, torch.Generator().manual_seed(0))
    p = stats.norm.cdf(0.3 / sigma)
    assert counts.shape == (1, 2) and int(counts.sum()) == n
    assert abs(int(counts[0, 1]) - n * p) < 6 * math.sqrt(n * p * (1 - p))


def test_a_certified_radius_rarely_exceeds_the_true_distance():
    """At alpha 0.05, over 1,000 certificates at distance 0.3, more than 97 wrong ones have P < 1e-9 (binomial tail)."""
    model, sigma, alpha, runs = HalfSpace((1, 3, 3)), 0.5, 0.05, 1000
    smooth, x, generator = Smooth(model, 2, sigma), model.at_distance(0.3), torch.Generator().manual_seed(1)
    radii = []
    for _ in range(runs):
        predict, radius = smooth.certify(x, 20, 400, alpha, 400, generator)
        radii.append(radius if predict == 1 else math.inf * (predict == 0))
    wrong = sum(radius > 0.3 for radius in radii)
    assert stats.binom.sf(97, runs, alpha) < 1e-9
    assert wrong <= 97
    assert sum(0 < radius <= 0.3 for radius in radii) > runs / 2  # and most certify something


def test_predict_errs_rarely_and_abstains_at_the_border():
    """At the border both have p = 1/2, an answer has probability at most alpha 0.05: of 400, P(> 60) < 1e-9."""
    model = HalfSpace((1, 3, 3))
    smooth, generator = Smooth(model, 2, 0.5), torch.Generator().manual_seed(2)
    at_border = [smooth.predict(model.at_distance(0.0), 200, 0.05, 200, generator) for _ in range(400)]
    assert sum(answer != ABSTAIN for answer in at_border) <= 60
    assert smooth.predict(model.at_distance(1.0), 200, 0.001, 200, generator) == 1


def test_an_image_at_the_border_is_abstained_from():
    model = HalfSpace((1, 3, 3))
    result = Smooth(model, 2, 0.5).certify(
        model.at_distance(0.0), 100, 1000, 0.001, 500, torch.Generator().manual_seed(0)
    )
    assert result == (ABSTAIN, 0.0)


def test_estimation_draws_are_fresh():
    """The classifier never sees a noisy copy twice: 20 that select and 50 that estimate are 70."""
    seen, model = [], HalfSpace((1, 3, 3))

    def classifier(images):
        seen.append(images)
        return model(images)

    Smooth(classifier, 2, 0.5).certify(model.at_distance(0.5), 20, 50, 0.05, 20, torch.Generator().manual_seed(0))
    assert len(torch.cat(seen)) == len(torch.cat(seen).unique(dim=0)) == 70


class FixedLogits(torch.nn.Module):
    """Three heads: two vote for class 0 narrowly, one for class 1 by far."""

    def forward(self, images):
        heads = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
        return heads.unsqueeze(1).expand(-1, len(images), -1)


def test_every_head_and_the_sum_of_logits_vote_in_one_pass():
    counts = Smooth(FixedLogits(), 3, 1.0).count_votes(torch.zeros(1, 2, 2), 25, 10)
    assert counts.tolist() == [[25, 0, 0], [25, 0, 0], [0, 25, 0], [0, 25, 0]]


@pytest.mark.parametrize(("voter", "drawn"), [(0, 50), (-1, 0)])
def test_the_voters_own_class_decides_whether_estimation_begins(voter, drawn):
    """Head 0 selects class 0, the ensemble class 1."""
    request = VoteRequest(torch.zeros(1, 2, 2), None, Draws(10, 50, voter, only_class=0))
    (votes,) = Smooth(FixedLogits(), 3, 1.0).count_many([request], 50)
    assert votes.estimation[-1].sum() == drawn


def test_a_rule_is_asked_about_the_voter():
    """Head 0 names class 0, the ensemble class 1."""
    asked = []

    def rule(selection, estimation):
        asked.append((selection.tolist(), estimation.tolist()))
        return True

    request = VoteRequest(torch.zeros(1, 2, 2), None, Draws(10, 500, 0, rule))
    list(Smooth(FixedLogits(), 3, 1.0).count_many([request], 500))
    assert asked == [([10, 0, 0], [100, 0, 0])]


def test_a_prediction_is_the_ensembles():
    """Head 0 names class 0, the sum class 1."""
    assert Smooth(FixedLogits(), 3, 1.0).predict(torch.zeros(1, 2, 2), 30, 0.001, 30) == 1


def test_a_plain_classifier_is_one_head():
    counts = Smooth(lambda images: FixedLogits()(images)[2], 3, 1.0).count_votes(torch.zeros(1, 2, 2), 25, 10)
    assert counts.tolist() == [[0, 25, 0]]


def test_the_same_generator_gives_the_same_votes():
    model = HalfSpace((1, 4, 4))
    smooth, x = Smooth(model, 2, 0.5), model.at_distance(0.1)
    votes = [smooth.count_votes(x, 999, 100, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert (votes[0] == votes[1]).all() and (votes[0] != votes[2]).any()


class ThreeHalves(torch.nn.Module):
    """An affine classifier of three classes with scores (-t, c, t), t = w.x / |w|: class 1 is the slab |t| < c.

    At t = d > 0 the smoothed classifier chooses class 2 and, for a thin slab, class 0 is next; both are half-spaces, so
    that Cohen et al.'s theorem is tight: the smoothed class changes at t = 0, at the distance d exactly.
    """

    def __init__(self, shape, c):
        super().__init__()
        w = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        self.direction, self.c = w / w.norm(), c

    def forward(self, images):
        t = (images * self.direction).flatten(1).sum(1)
        return torch.stack([-t, torch.full_like(t, self.c), t], dim=1)


def test_all_votes_rarely_exceed_the_true_distance_of_three_classes_and_reach_further():
    """At alpha 0.05, over 1,000 certificates at distance 0.3, more than 97 wrong ones have P < 1e-9 (binomial tail)."""
    model, sigma, alpha, runs = ThreeHalves((1, 3, 3), 0.05), 0.5, 0.05, 1000
    p_a, p_b = stats.norm.cdf(0.5), stats.norm.cdf(-0.7)
    assert sigma / 2 * (stats.norm.ppf(p_a) - stats.norm.ppf(p_b)) == pytest.approx(0.3)
    smooth, x, generator = Smooth(model, 3, sigma), model.direction * 0.3, torch.Generator().manual_seed(1)
    requests = [VoteRequest(x, generator, Draws(50, 400)) for _ in range(runs)]
    votes = [(done.selection[-1], done.estimation[-1]) for done in smooth.count_many(requests, 450)]
    radii = np.array([multiclass_certificate(*one, alpha, sigma) for one in votes])
    papers = np.array([Certificate(alpha, sigma)(*one) for one in votes])
    wrong = (radii[:, 0] == 2) & (radii[:, 1] > 0.3) | (radii[:, 0] < 2) & (radii[:, 0] >= 0)
    assert wrong.sum() <= 97 and stats.binom.sf(97, runs, alpha) < 1e-9
    assert (radii[:, 1] * (radii[:, 0] == 2)).mean() > 1.05 * (papers[:, 1] * (papers[:, 0] == 2)).mean()


def test_logits_of_other_classes_are_not_counted():
    with pytest.raises(RunError, match="logits of 3 classes, not of 10"):
        Smooth(FixedLogits(), 10, 1.0).count_votes(torch.zeros(1, 2, 2), 25, 10)


class RoundsByPass(FixedPasses):
    """It names the number of images that a pass can hold, as if it rounded that badly, or class 0 where the mean of the
    noise is below 0; its memory is short once.
    """

    def __init__(self, most, passes_until_short):
        super().__init__(torch.device("cpu"), most, compiled=False)
        self.passes_left, self.images_per_pass = passes_until_short, most

    def logits(self, images):
        self.passes_left -= 1
        if self.passes_left == 0:
            raise torch.OutOfMemoryError
        return torch.eye(65)[torch.where(images.flatten(1).mean(1) < 0, 0, self.max_pass_size)].unsqueeze(0)


def test_an_images_votes_are_all_of_passes_of_one_size(capsys):
    def votes(network):
        images = (
            VoteRequest(torch.zeros(1, 4, 4), torch.Generator().manual_seed(idx), Draws(20, 200), idx)
            for idx in range(6)
        )
        smooth = Smooth(network, 65, 0.5)
        return {one.idx: (one.selection.tolist(), one.estimation.tolist()) for one in smooth.count_many(images, 64)}

    found, large, small = votes(RoundsByPass(64, 9)), votes(RoundsByPass(64, -1)), votes(RoundsByPass(32, -1))
    assert all(found[idx] in (large[idx], small[idx]) for idx in range(6))
    assert found[0] == large[0] and found[5] == small[5]
    assert "from here on 32 images per pass" in capsys.readouterr().err


class DisagreesOnAll(RoundsByPass):
    """Three heads of which the first two never agree."""

    def logits(self, images):
        first = super().logits(images)
        return torch.cat([first, first.roll(1, -1), first])


def test_what_was_drawn_before_a_pass_was_halved_is_no_disagreement():
    requests = (VoteRequest(torch.zeros(1, 4, 4), None, Draws(20, 200), idx) for idx in range(6))
    found = list(Smooth(DisagreesOnAll(64, 9), 65, 0.5, consensus=2).count_many(requests, 64))
    assert [one.disagreed for one in found] == [220] * 6


def test_the_loop_computes_what_its_docstring_says():
    """The code in Smooth's docstring, run: the same class and radius of images that are certified and that are not."""
    code = Smooth.__doc__.split("copies:\n")[1].split("Everything else")[0]
    source = "def plain(x, generator):\n" + textwrap.indent(textwrap.dedent(code), "    ")
    weights = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0)) / 4
    names = {"base_classifier": lambda images: torch.einsum("lkd,nd->lnk", weights, images.flatten(1))}
    names |= {"sigma": 0.5, "num_classes": 4, "n0": 50, "n": 500, "alpha": 0.01, "ABSTAIN": ABSTAIN, "torch": torch}
    names |= {"lower_confidence_bound": lower_confidence_bound, "ndtri": special.ndtri}
    exec(source, names)
    smooth, found = Smooth(names["base_classifier"], 4, 0.5), []
    for seed in range(12):
        x = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 4
        expected = names["plain"](x, torch.Generator().manual_seed(seed))
        label, radius = smooth.certify(x, 50, 500, 0.01, 1000, torch.Generator().manual_seed(seed))
        assert (label, radius) == (int(expected[0]), pytest.approx(float(expected[1]), abs=1e-9))
        found.append(label)
    assert ABSTAIN in found and len(set(found)) > 2
