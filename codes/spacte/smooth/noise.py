"""Noisy copies of an image: float32 Gaussian noise, or noise whose distribution is known to the last bit."""

from typing import Protocol

import mpmath
import torch
from torch import Generator, Tensor

from spacte.utils import UserError

_BITS = 62  # of the uniform integers that choose a grid noise


class Noise(Protocol):
    """Draws noisy copies x + sigma * N(0, I), or what is as good."""

    sigma: float

    def slack(self, pixels: int, draws: int) -> float:
        """What the noise's law costs the alpha of a claim about `draws` noisy copies of that many pixels."""

    def check(self, x: Tensor) -> None:
        """UserError if an image can have no such noise. Asked once for each image, for it may wait for the device."""

    def __call__(self, x: Tensor, n: int, generator: Generator | None = None) -> Tensor:
        """n independent noisy copies of an image that passes `check`: x [C, H, W] -> [n, C, H, W]."""


class GaussianNoise:
    """x + sigma * N(0, I) in float32, as is usual: its certificates take float32 normals for real ones."""

    def __init__(self, sigma: float):
        self.sigma = sigma

    def slack(self, pixels: int, draws: int) -> float:
        """What the noise's law costs a claim's alpha: nothing, where float32 normals are taken for real ones."""
        return 0.0

    def check(self, x: Tensor) -> None:
        """Every image can have it."""

    def __call__(self, x: Tensor, n: int, generator: Generator | None = None) -> Tensor:
        """n independent noisy copies: x [C, H, W] -> [n, C, H, W]."""
        noise = torch.randn((n, *x.shape), device=x.device, dtype=x.dtype, generator=generator)
        if x.is_cuda:
            return torch.add(x, noise, alpha=self.sigma, out=noise)  # one kernel, and one rounding less
        return noise.mul_(self.sigma).add_(x)


class GridNoise:
    """Gaussian noise rounded to the data's grid, drawn with integers: the certificate holds in floating point.

    Let Q round each pixel to the nearest multiple of 1/levels and f be the network. Smoothing f o Q with real Gaussian
    noise e is ordinary smoothing of a classifier, so its certificate is the usual theorem. Where x lies on the grid,
    Q(x + e) = x + Q(e), and Q(e) takes the value k/levels with probability Phi((k + 1/2)/(levels sigma)) -
    Phi((k - 1/2)/(levels sigma)). So it suffices to draw k: by where a uniform 62-bit integer falls among the
    cumulative probabilities of k, rounded to 62 bits. The argument then needs no float32 normal and no rounding of
    x + e. It assumes that the generator's bits are uniform, and that the network is a function of its input. Rounding
    moves each cumulative probability by at most 2^-63, hence one pixel's law, over its `2 reach + 1` values, by less
    than (2 reach + 1) 2^-62 in total variation. `slack` bounds that for all pixels of all draws together: to hold at
    level alpha, a certificate must be computed at alpha - slack.

    Source: Voracek and Hein (ICLR 2023, arXiv 2207.07209).
    """

    def __init__(self, sigma: float, levels: int):
        self.sigma, self.levels = sigma, levels
        reach = int(10 * sigma * levels) + 1  # Phi(-10) < 2^-62: nothing is beyond
        with mpmath.workprec(256):
            step = mpmath.mpf(1) / (levels * mpmath.mpf(sigma))
            cumulative = [mpmath.ncdf((k + mpmath.mpf(1) / 2) * step) for k in range(-reach, reach)]
            self.thresholds = torch.tensor([int(mpmath.nint(q * 2**_BITS)) for q in cumulative])
        self.reach = reach

    def slack(self, pixels: int, draws: int) -> float:
        """How far the law of `draws` noisy copies of that many pixels may be from the exact one, in total variation."""
        return (2 * self.reach + 1) * pixels * draws / 2**_BITS

    def __call__(self, x: Tensor, n: int, generator: Generator | None = None) -> Tensor:
        """n independent noisy copies on the grid, of an image on it: x [C, H, W] -> [n, C, H, W]; see `check`."""
        uniform = torch.randint(2**_BITS, (n, *x.shape), device=x.device, generator=generator)
        self.thresholds = self.thresholds.to(x.device)
        steps = torch.searchsorted(self.thresholds, uniform, right=True) - self.reach
        return ((x * self.levels).round() + steps) / self.levels

    def check(self, x: Tensor) -> None:
        """UserError if the image's pixels are not on the grid, or are too large.

        In steps of the grid their sums with the noise stay below 2^24, where float32 holds every whole number.
        """
        levels = (x * self.levels).round()
        largest, off = torch.stack([levels.abs().max(), (x * self.levels - levels).abs().max()]).tolist()
        if largest + self.reach >= 2**24:
            raise UserError(f"exact noise on a grid of 1/{self.levels} needs values below {2**24 / self.levels:.3g}")
        if off > 1e-3:  # float32's own rounding of k / levels is less
            raise UserError(f"exact noise needs images whose pixels are multiples of 1/{self.levels}")
