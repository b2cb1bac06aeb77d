import inspect
import itertools
import math

import pytest
import torch
from conftest import DEFENCES, golden, load_module

from spacte.train.teaching import (
    EXPLORE,
    Pace,
    class_quantiles,
    head_weights,
    pace_threshold,
    received_weights,
    taught_cross_entropy,
    teaching_weights,
)
from spacte.utils import UserError


@pytest.mark.parametrize("case", golden("losses")["pace_threshold"])
def test_pace_is_the_authors(case):
    value = pace_threshold(case["epoch"], case["epochs"], case["num_classes"], case["lbdlast"])
    assert value == pytest.approx(case["value"], rel=1e-5)


@pytest.mark.parametrize("epochs", [2, 3, 40, 150])
@pytest.mark.parametrize("last", [0.5, 1.2, 3.0])
def test_pace_meets_both_ends_and_is_monotone(epochs, last):
    pace = [pace_threshold(t, epochs, 10, last) for t in range(1, epochs + 1)]
    assert pace[0] == pytest.approx(math.log(10)) and pace[-1] == pytest.approx(last)
    steps = [(after - before) * (last - pace[0]) for before, after in itertools.pairwise(pace)]
    assert min(steps) > 0


def test_pace_of_one_epoch_is_its_start():
    assert pace_threshold(1, 1, 7, 0.8) == pytest.approx(math.log(7))


def test_weights_follow_the_formula():
    losses, threshold = torch.tensor([[0.2, 3.0], [2.0, 0.5], [1.4, 9.0]]), 1.0
    weights = teaching_weights(losses, threshold)
    for h in range(3):
        for i in range(2):
            pupil = float(losses[(h + 1) % 3, i])
            hard = (1 + math.exp(-threshold)) / (1 + math.exp(pupil - threshold))
            assert float(weights[h, i]) == pytest.approx(1.0 if losses[h, i] <= threshold else hard)
    assert torch.equal(received_weights(losses, threshold)[1], weights[0])


def test_turning_the_ring_turns_the_weights():
    losses = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(teaching_weights(losses.roll(2, 0), 1.1), teaching_weights(losses, 1.1).roll(2, 0))


@pytest.mark.parametrize("threshold", [0.0, 0.8, 2.3])
def test_weights_stay_in_0_1_however_large_the_loss(threshold):
    losses = torch.tensor([0.0, 1e-30, 0.8, 5.0, 88.0, 1e4, 3e38, math.inf])
    weights = teaching_weights(torch.cartesian_prod(losses, losses).T.contiguous(), threshold)
    assert bool(((weights >= 0) & (weights <= 1)).all())


def test_an_easy_sample_has_weight_1():
    losses = torch.rand(4, 100) * 3
    assert bool((teaching_weights(losses, 1.5)[losses <= 1.5] == 1).all())


def test_one_head_teaches_itself_nothing():
    assert torch.equal(teaching_weights(torch.tensor([[0.1, 50.0]]), 0.5), torch.ones(1, 2))
    assert torch.equal(head_weights(torch.tensor([3.0]), 0.8), torch.ones(1))


def test_no_gradient_flows_through_weights_and_shares():
    losses = torch.rand(3, 8, requires_grad=True)
    assert not teaching_weights(losses, 0.5).requires_grad
    assert not head_weights(losses.mean(1), 0.8).requires_grad


@pytest.mark.parametrize("heads", [2, 5])
def test_eps_of_equal_shares_is_the_plain_mean(heads):
    shares = head_weights(torch.rand(heads), (heads - 1) / heads)
    assert torch.allclose(shares, torch.full((heads,), 1 / heads))


def test_the_best_head_is_favoured():
    shares = head_weights(torch.tensor([2.0, 1.0, 3.0]), eps=0.4, explore=0)
    assert shares.tolist() == pytest.approx([0.2, 0.6, 0.2])


def test_exploration_draws_every_head_at_its_rate():
    """20,000 draws at rate 0.5: each of 4 heads is favoured with its binomial probability to within 6 sd (P < 1e-8)."""
    generator, draws, explore = torch.Generator().manual_seed(1), 20_000, 0.5
    losses = torch.tensor([2.0, 1.0, 3.0, 4.0])
    favoured = torch.stack([head_weights(losses, 0.3, explore, generator).argmax() for _ in range(draws)])
    for head, count in enumerate(torch.bincount(favoured, minlength=4).tolist()):
        p = explore / 4 + (1 - explore) * (head == 1)
        assert abs(count - draws * p) < 6 * math.sqrt(draws * p * (1 - p))


# --- beyond the paper: who paces, and a lambda for each class ---

WHOLE = 64  # samples, a multiple of any CPU's vectors: what is left over torch's sigmoid may round otherwise


def test_a_head_that_paces_itself_is_a_ring_of_its_twins():
    """With L = 1 the ring's formula is the head's own weight; agreeing heads weigh alike in both."""
    losses, threshold = torch.rand(1, WHOLE, generator=torch.Generator().manual_seed(3)) * 4, 1.3
    twins = received_weights(losses.expand(3, -1), threshold)
    own = received_weights(losses, threshold, "self")
    assert torch.equal(own.expand(3, -1), twins) and 0 < float((own < 1).float().mean()) < 1
    assert torch.equal(received_weights(losses.expand(3, -1), threshold, "self"), twins)


def test_a_head_that_paces_itself_does_not_look_at_its_neighbours():
    losses = torch.rand(3, WHOLE, generator=torch.Generator().manual_seed(4)) * 4
    together = received_weights(losses, 1.0, "self")
    alone = torch.cat([received_weights(row.unsqueeze(0), 1.0, "self") for row in losses])
    assert torch.equal(together, alone) and not torch.equal(together, received_weights(losses, 1.0))


def test_where_nobody_paces_every_weight_is_1():
    losses = torch.tensor([[0.1, math.inf], [3e38, 2.0]])
    assert torch.equal(received_weights(losses, 0.5, "none"), torch.ones(2, 2))


def test_the_weights_of_a_head_that_paces_itself_are_the_gradient_of_a_bounded_loss():
    """phi of the module's docstring, by central differences; at lambda .8 it stays below 1.805."""
    lam = 0.8

    def phi(loss):
        u = loss - lam
        hard = lam + (1 + math.exp(-lam)) * (u - torch.log1p(torch.exp(u)) + math.log(2))
        return torch.where(loss <= lam, loss, hard)

    losses = torch.cat([torch.linspace(0.05, lam - 0.05, 20), torch.linspace(lam + 0.05, 9, 60)]).double()
    slopes = (phi(losses + 1e-5) - phi(losses - 1e-5)) / 2e-5
    torch.testing.assert_close(received_weights(losses.unsqueeze(0), lam, "self")[0], slopes, rtol=1e-6, atol=1e-8)
    bound = lam + (1 + math.exp(-lam)) * math.log(2)
    assert bound == pytest.approx(1.805, abs=5e-4) and float(phi(torch.tensor(30.0).double())) == pytest.approx(bound)


def test_a_lambda_for_each_class_is_the_samples_own():
    losses, labels = torch.rand(3, 40, generator=torch.Generator().manual_seed(5)) * 4, torch.arange(40) % 2
    by_class = Pace(torch.tensor([0.7, 2.1])).threshold_of(labels)
    assert by_class.tolist()[:2] == pytest.approx([0.7, 2.1])
    weights = received_weights(losses, by_class)
    for k, lam in enumerate((0.7, 2.1)):
        torch.testing.assert_close(weights[:, labels == k], received_weights(losses[:, labels == k], lam))


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_a_share_of_each_class_is_easy(share):
    """Of 2 heads and 500 samples a class, one class ten times as hard as the other."""
    labels = torch.arange(1000) % 2
    losses = torch.rand(2, 1000, generator=torch.Generator().manual_seed(6)) * (1 + 9.0 * labels)
    found = class_quantiles(losses, labels, share, 3)
    for k in (0, 1):
        easy = (losses[:, labels == k] <= found[k]).float().mean()
        assert float(easy) == pytest.approx(share, abs=0.002)
    assert float(found[1] / found[0]) == pytest.approx(10, rel=0.1)
    assert found[2] == math.inf, "of a class without samples everything is easy"


@pytest.mark.parametrize("by", ["neighbour", "self"])
def test_a_share_of_1_weighs_every_sample_1(by):
    losses, labels = torch.rand(3, 30) * 50, torch.arange(30) % 4
    pace = Pace(class_quantiles(losses, labels, 1.0, 4), by)
    assert torch.equal(received_weights(losses * 2, pace.threshold_of(labels), by), torch.ones(3, 30))


def test_a_further_loss_must_be_one_of_each_head_and_sample():
    loss = taught_cross_entropy(torch.randn(2, 1, 5, 3), torch.zeros(5, dtype=torch.long), 1.0, 0.5)
    assert loss.weighted_mean(torch.ones(2, 5)).dim() == 0
    for shape in ((2,), (5,), (2, 5, 3)):
        with pytest.raises(UserError, match=r"they must be \[L, B\], here \[2, 5\]"):
            loss.weighted_mean(torch.ones(shape))


@pytest.mark.parametrize("by", ["neighbour", "self"])
def test_a_loss_of_exactly_lambda_is_easy(by):
    losses = torch.full((2, 3), 1.5)
    for lam in (1.5, losses[0]):
        assert torch.equal(received_weights(losses, lam, by), torch.ones(2, 3))
    loss = taught_cross_entropy(torch.randn(2, 1, 3, 5), torch.arange(3), Pace(1.5, by, losses), 0.5)
    assert loss.easy == 1


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_explores_at_the_common_rate(defence):
    assert EXPLORE == 0.01
    assert inspect.signature(load_module(defence, "circular_teaching").ct_loss).parameters["explore"].default == EXPLORE
