"""Grid noise: its law, its place on the grid, what it costs a certificate."""

import math
from dataclasses import replace
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from spacte.logs.certified import certificate_of, certified
from spacte.logs.config import RunConfig
from spacte.logs.counts import VoteCounts
from spacte.logs.plans import PredictPlan
from spacte.smooth.certificates import ABSTAIN, Certificate
from spacte.smooth.noise import GaussianNoise, GridNoise
from spacte.smooth.smooth import Smooth
from spacte.smooth.topk import TopK


def grid_noise(sigma=0.25, levels=255):
    return GridNoise(sigma, levels)


@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 255), (0.5, 16), (1.0, 255), (0.03, 16)])
def test_the_noise_has_the_rounded_gaussians_law(sigma, levels):
    """Against the exact law on 200,000 draws: moments to 6 standard errors, each frequency too (P < 1e-6 in all)."""
    noise, n = grid_noise(sigma, levels), 200_000
    steps = (noise(torch.zeros(1, 1, 1), n, torch.Generator().manual_seed(0)) * levels).round().flatten().double()
    assert abs(float(steps.mean())) < 6 * sigma * levels / math.sqrt(n) + 1e-9
    k = torch.arange(-noise.reach, noise.reach + 1).double().numpy()
    law = stats.norm.cdf((k + 0.5) / (sigma * levels)) - stats.norm.cdf((k - 0.5) / (sigma * levels))
    variance = float((law * k**2).sum())
    spread = math.sqrt(float((law * k**4).sum()) - variance**2)
    assert abs(float(steps.square().mean()) - variance) < 6 * spread / math.sqrt(n)
    for value in (-2, -1, 0, 1, 3):
        share = float(law[value + noise.reach])
        assert abs(int((steps == value).sum()) - n * share) < 6 * math.sqrt(n * share) + 1e-9


@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 255), (0.5, 16), (0.03, 16)])
def test_the_slack_bounds_the_total_variation_of_a_pixel(sigma, levels):
    """Of the law that the rounded thresholds have, against the exact one, in 256 bits."""
    noise = grid_noise(sigma, levels)
    with mpmath.workprec(256):
        step = 1 / (levels * mpmath.mpf(sigma))
        exact = [mpmath.ncdf((k + mpmath.mpf(1) / 2) * step) for k in range(-noise.reach, noise.reach)]
        drawn = [mpmath.mpf(one) / 2**62 for one in noise.thresholds.tolist()]
        laws = [[after - before for before, after in pairwise([0, *law, 1])] for law in (exact, drawn)]
        variation = sum(abs(a - b) for a, b in zip(*laws, strict=True)) / 2
    assert 0 < variation <= noise.slack(1, 1)


def test_the_quantiles_are_exact_to_62_bits():
    noise = grid_noise(0.5, 16)
    middle = noise.thresholds[noise.reach - 1 : noise.reach + 1].tolist()  # Phi(-1/16) and Phi(1/16), which sum to 1
    assert sum(middle) == 2**62
    assert middle[1] / 2**62 == pytest.approx(stats.norm.cdf(1 / 16), rel=1e-15)
    assert torch.all(noise.thresholds.diff() >= 0)
    assert noise.thresholds[0] == 0 and noise.thresholds[-1] == 2**62


def test_noisy_images_lie_on_the_grid_and_shift_with_the_image():
    noise = grid_noise()
    x = torch.randint(0, 256, (1, 4, 4), generator=torch.Generator().manual_seed(1)).float() / 255
    y = torch.randint(0, 256, (1, 4, 4), generator=torch.Generator().manual_seed(2)).float() / 255
    noisy_x, noisy_y = (noise(image, 50, torch.Generator().manual_seed(3)) * 255 for image in (x, y))
    assert torch.allclose(noisy_x, noisy_x.round(), atol=1e-3)
    assert torch.equal(noisy_x.round() - (x * 255).round(), noisy_y.round() - (y * 255).round())


def test_an_image_off_the_grid_is_refused_before_it_is_drawn(monkeypatch):
    """Each image is looked at once, for that waits for the device, however many portions its draws have."""
    asked, check = [], GridNoise.check
    monkeypatch.setattr(GridNoise, "check", lambda noise, x: (asked.append(x), check(noise, x))[1])
    smooth = Smooth(lambda x: torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1), 2, 0.5, grid_noise(0.5))
    smooth.count_votes(torch.full((1, 4, 4), 51 / 255), 100, batch_size=10)
    with pytest.raises(ValueError, match="multiples of 1/255"):
        smooth.count_votes(torch.full((1, 4, 4), 0.3), 100, batch_size=10)
    assert len(asked) == 2


def test_the_slack_is_that_of_the_proof():
    noise = GridNoise(0.25, 255)
    assert noise.slack(48, 1000) == (2 * noise.reach + 1) * 48_000 / 2**62


def test_the_slack_is_paid_for_by_the_certificate():
    assert 0 < GridNoise(1.0, 255).slack(3 * 32 * 32, 100_000) < 1e-6
    assert grid_noise().slack(48, 1000) == pytest.approx(48_000 * grid_noise().slack(1, 1)), "each pixel of each draw"
    model = lambda images: torch.stack([images.flatten(1).sum(1) * 0, images.flatten(1).sum(1) * 0 + 1], 1)  # noqa: E731
    x, wide = torch.zeros(1, 4, 4), grid_noise()
    asked = []
    wide.slack = lambda *of: asked.append(of) or 0.0009
    _, radius = Smooth(model, 2, 0.25, wide).certify(x, 10, 1000, 0.001, 500)
    assert radius == Certificate(0.001 - 0.0009, 0.25).radius(1000, 0, 1000, 10) and asked == [(16, 1000)]
    twelve = [Smooth(model, 2, 0.25, noise).predict(x, 12, 0.001, 50) for noise in (wide, grid_noise())]
    assert twelve == [ABSTAIN, 1], "12 of 12 votes: p is 2^-11, .0005"


def test_the_slack_is_paid_in_a_run_too():
    config = RunConfig(alpha=0.001, noise_slack=0.0009, noise_sd=0.25, N=100)
    assert certificate_of(config).alpha == pytest.approx(0.0001)
    votes = VoteCounts(0, 0, 1.0, np.zeros((1, 2)), np.array([[68, 32]]))  # the binomial test's p is 0.0004
    assert "\t0\t1\t" in PredictPlan(replace(config, noise_slack=0.0)).rows(votes)
    assert f"\t{ABSTAIN}\t0\t" in PredictPlan(config).rows(votes)


@pytest.mark.parametrize("certificate", ["cohen", "all-votes"])
def test_the_slack_is_paid_for_top_k_too(certificate):
    config = RunConfig(alpha=0.001, noise_slack=0.0009, noise_sd=0.25, N=100, top_k=2, certificate=certificate)
    votes = np.array([[90, 5, 3, 2]])
    found = certified(VoteCounts(0, 0, 1.0, np.zeros((1, 4), int), votes), config)
    assert found == TopK(0.001 - 0.0009, 0.25, 2, kind=certificate)(0, votes[0]) and found[1] > 0


def test_float_noise_has_the_asked_deviation():
    noisy = GaussianNoise(0.5)(torch.ones(1, 8, 8), 2000, torch.Generator().manual_seed(0))
    assert float(noisy.mean()) == pytest.approx(1, abs=6 * 0.5 / math.sqrt(128_000))
    assert float(noisy.std()) == pytest.approx(0.5, rel=0.02)
