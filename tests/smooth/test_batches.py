"""Many images share a batch: their votes do not depend on it, it stays full, its time is shared."""

import pytest
import torch

from spacte.smooth.draws import Draws, portion
from spacte.smooth.smooth import Smooth, _next_batch
from spacte.smooth.tally import Tally, VoteRequest


class Means(torch.nn.Module):
    """Two heads that vote by the noisy image's mean and by its first pixel; notes the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        scores = torch.stack([images.flatten(1).mean(1), images.flatten(1)[:, 0]])  # [2, N]
        return torch.stack([-scores, scores], dim=-1)


def requests(ns):
    """One image for each n, each with its own generator."""
    for seed, n in enumerate(ns):
        yield VoteRequest(
            torch.full((1, 2, 2), 0.1 * (seed - 3)), torch.Generator().manual_seed(seed), Draws(0, n), seed
        )


def test_votes_do_not_depend_on_the_company():
    ns, model = [250, 30, 100, 700, 5, 333], Means()
    smooth = Smooth(model, 2, 0.5)
    together = {one.idx: one.estimation for one in smooth.count_many(requests(ns), 100)}
    assert sum(model.sizes) == sum(ns) and max(model.sizes) <= 100
    alone = [smooth.count_votes(one.x, n, 100, one.generator) for one, n in zip(requests(ns), ns, strict=True)]
    for seed, votes in enumerate(alone):
        assert votes.sum(1).tolist() == [ns[seed]] * 3
        assert (together[seed] == votes).all()


def test_batches_stay_full_where_images_stop_early():
    """A rule that stops 400 images after 100 to 3,000 draws: the batches are nearly full, the oldest goes first."""
    model, stops = Means(), torch.randint(100, 3000, (400,), generator=torch.Generator().manual_seed(1)).tolist()

    def images():
        for seed, stop in enumerate(stops):
            draws = Draws(0, 10_000, should_stop=lambda _, estimation, stop=stop: int(estimation.sum()) >= stop)
            yield VoteRequest(torch.zeros(1, 2, 2), torch.Generator().manual_seed(seed), draws, seed)

    done = [(one.idx, int(one.estimation[-1].sum())) for one in Smooth(model, 2, 0.5).count_many(images(), 1000)]
    assert sorted(key for key, _ in done) == list(range(400))
    assert all(used >= stops[key] for key, used in done)
    assert sum(model.sizes) / len(model.sizes) > 900
    assert all(abs(key - place) < 40 for place, (key, _) in enumerate(done))


def test_the_seconds_of_the_images_are_those_of_the_run(monkeypatch):
    """Also where the device is waited for only at the end: shared by copies since the last wait."""
    clock = iter(range(10_000))
    monkeypatch.setattr("spacte.smooth.smooth.time.monotonic", lambda: float(next(clock)))
    done = {one.idx: one.seconds for one in Smooth(Means(), 2, 0.5).count_many(requests([250, 30, 700]), 100)}
    # images 0 and 1 are finished with the same batch: the first tick; image 2 alone takes the second
    assert done == pytest.approx({0: 250 / 280, 1: 30 / 280, 2: 1})


def test_a_rule_is_asked_after_100_draws_and_then_after_a_quarter_more():
    drawn = [0, 100, 400, 800, 8000, 9950]
    assert [portion(n, 10_000, 1000, True) for n in drawn] == [100, 100, 100, 200, 1000, 50]
    assert portion(0, 10_000, 1000, False) == 1000 and portion(9950, 10_000, 1000, False) == 50


def test_no_image_is_begun_while_the_youngest_waits():
    one, two, three = (VoteRequest(torch.zeros(1, 2, 2), None, Draws(0, 60)) for _ in range(3))
    active = [Tally(one, 100), Tally(two, 100)]
    assert _next_batch(active, iter([three]), 100) == active[:1] and len(active) == 2


def test_a_restarted_tally_keeps_its_seconds():
    tally = Tally(VoteRequest(torch.zeros(1, 2, 2), None, Draws(0, 60)), 100, 2.5)
    assert tally.restarted().seconds == 2.5
