"""The votes of all images that look after a batch are fetched from the device together."""

import numpy as np
import pytest
import torch

from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import VoteRequest
from spacte.utils import RunError


class Sign(torch.nn.Module):
    """Two heads that vote by the noisy image's mean and first pixel; not finite where the mean is below -5."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        mean = images.flatten(1).mean(1)
        scores = torch.stack([torch.where(mean < -5, torch.nan, mean), images.flatten(1)[:, 0]])
        return torch.stack([-scores, scores], dim=-1)


def requests_of(values, draws):
    for idx, value in enumerate(values):
        yield VoteRequest(torch.full((1, 2, 2), value), torch.Generator().manual_seed(idx), draws, idx)


@pytest.fixture
def transfers(monkeypatch):
    """Of how many bytes each transfer from the device was."""
    sizes, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: sizes.append(self.nbytes) or real(self))
    return sizes


@pytest.mark.parametrize("consensus", [None, 1])
def test_a_batch_has_at_most_one_transfer_for_all_who_look(transfers, consensus):
    """Twenty images look often, several of them in each batch; the votes are those of each image alone."""
    looks = []

    def should_stop(selection, estimation):
        looks.append(int(estimation.sum()))
        return bool(estimation[1] > 260)

    def found(values):
        requests = Smooth(Sign(), 2, 0.5, consensus=consensus).count_many(values, 1000)
        return {one.idx: (one.selection.tolist(), one.estimation.tolist()) for one in requests}

    values, draws = np.linspace(-0.5, 0.5, 20).tolist(), Draws(100, 2000, should_stop=should_stop)
    together = found(requests_of(values, draws))
    shared, asked = len(transfers), len(looks)
    single = {}
    for one in requests_of(values, draws):
        single |= found([one])
    assert together == single
    assert shared < asked / 3, "several images look after the same batch"
    to_the_end = sum(sum(estimation[-1]) == 2000 for _, estimation in together.values())
    assert len(transfers) - shared == asked + 20 + to_the_end, "alone each look and each phase has its own"


def test_transfers_are_no_more_than_batches(transfers):
    network = Sign()
    draws = Draws(100, 2000, should_stop=lambda selection, estimation: False)
    assert len(list(Smooth(network, 2, 0.5).count_many(requests_of([0.1] * 20, draws), 1000))) == 20
    assert len(transfers) <= network.passes


def test_a_fixed_number_of_draws_is_fetched_where_phases_end(transfers):
    """One transfer ends the selection of four images, one their estimation, and one the ten batches of an image."""
    network = Sign()
    assert len(list(Smooth(network, 2, 0.5).count_many(requests_of([0.1] * 4, Draws(25, 250)), 1000))) == 4
    assert network.passes == len(transfers) == 2
    transfers.clear()
    assert len(list(Smooth(network, 2, 0.5).count_many(requests_of([0.1], Draws(0, 1000)), 100))) == 1
    assert len(transfers) == 1


def test_the_image_whose_logits_are_not_finite_is_named_among_those_of_its_batch():
    requests = requests_of([0.1, -9.0, 0.2], Draws(10, 50))
    with pytest.raises(RunError, match="not finite on 10 of 10 noisy copies of image idx 1"):
        list(Smooth(Sign(), 2, 0.5).count_many(requests, 100))
