import itertools
import math

import pytest
import torch
from conftest import golden

from spacte.train.teaching import head_weights, pace_threshold, received_weights, teaching_weights


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
