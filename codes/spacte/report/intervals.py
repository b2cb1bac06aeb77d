"""95 % intervals of differences: of the mean of radii, of accuracies, of the means of experiments."""

import numpy as np
from scipy.special import ndtri, stdtrit

_LEVEL = 0.95
# Student's t holds its level from here on. Simulated on the differences of the authors' CIFAR-10 logs (the three pairs
# of defences at each sigma; 30 to 57 % zeros) and of three pairs of our digits logs, its 95 % interval misses the mean
# in at most 9.9 % of samples of 10 images, 7.2 % of 20, 5.9 % of 50, 5.2 % of 500 (normal differences: 5 % always). On
# three of these pairs the percentile bootstrap misses it in up to 14, 11, 8 and 5 %, BCa in up to 19, 13, 9 and 6 %.
# Images on which the two agree tell little of the spread and are not counted: of 50 images with 40 zeros and a long
# tail, t misses 8.9 %.
FEWEST_DIFFERENT = 50
_ROUNDING = 1e-9  # of differences of radii, which have 6 digits


def acr_interval(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's 95 % interval of the mean of differences of radii: [F, images] -> low [F], high [F].

    NaN where fewer than FEWEST_DIFFERENT of the differences are not 0, and where all are equal. The level is
    approximate: where a few images of hundreds carry most of the difference, no interval of theirs holds.
    """
    images = differences.shape[1]
    mean, spread = differences.mean(axis=1), differences.std(axis=1, ddof=1)
    half = stdtrit(images - 1, (1 + _LEVEL) / 2) * spread / np.sqrt(images)
    half[(differ(differences).sum(axis=1) < FEWEST_DIFFERENT) | (spread < _ROUNDING)] = np.nan
    return mean - half, mean + half


def interval_over_seeds(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences [seeds, images]: over images, and over seeds if several.

    NaN where fewer than FEWEST_DIFFERENT images differ, averaged over the seeds, and where all differ alike.
    """
    if differences.shape[1] < 2 or int(differ(differences.mean(axis=0)).sum()) < FEWEST_DIFFERENT:
        return np.nan, np.nan
    if len(differences) == 1:
        low, high = acr_interval(differences)
    else:
        low, high = experiments_interval(differences[None], np.zeros((1, 1, differences.shape[1])))
    return float(low[0]), float(high[0])


def experiments_interval(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A 95 % interval of the difference of two experiments' means: [F, seeds, images] each -> low [F], high [F].

    For other test images and other seeds alike. With D_i the difference of the means over seeds on image i, and A_s and
    B_s the means over images of each seed, the variance of the difference is estimated by

        var_i(D_i) / images + var_s(A_s) / seeds of a + var_s(B_s) / seeds of b

    which counts the share that belongs to image and seed together twice and so is too large rather than too small in
    the mean; Student's t with Satterthwaite's degrees of freedom. Simulated with normal effects of images, seeds and
    both together, 5 or 2 seeds a side and 100 images, it leaves out the true difference in 0.6 to 5.0 % of the cases,
    and with one run against 5 in up to 5.9 %. An experiment of one run adds no variance of seeds. NaN where the
    variance is 0.
    """
    parts = [(_variance(a.mean(axis=1) - b.mean(axis=1)), a.shape[2])]
    parts += [(_variance(one.mean(axis=2)), one.shape[1]) for one in (a, b) if one.shape[1] > 1]
    variances = np.array([variance / count for variance, count in parts])
    freedom = np.array([[count - 1] for _, count in parts])
    total = variances.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing varies
        degrees = total**2 / (variances**2 / freedom).sum(axis=0)
    half = stdtrit(degrees, (1 + _LEVEL) / 2) * np.sqrt(total)
    mean = a.mean(axis=(1, 2)) - b.mean(axis=(1, 2))
    half[total < _ROUNDING**2] = np.nan
    return mean - half, mean + half


def _variance(values: np.ndarray) -> np.ndarray:
    return values.var(axis=-1, ddof=1)


def accuracy_interval(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A 95 % interval of the difference of two paired proportions: [F, images], booleans -> low [F], high [F].

    Bonett and Price (2012), as recommended by Fagerland, Lydersen and Laake (2014): Wald's after one image more on
    each side. Where the proportions are equal, it leaves out 0 in at most 5.0 % of samples of 10, 20, 50, 100 or 500
    images, added up over all outcomes, for all shares of images that differ from 1 % to 50 %.
    """
    images = a.shape[1] + 2
    only_a, only_b = ((one & ~other).sum(axis=1) + 1 for one, other in ((a, b), (b, a)))
    only_a, only_b = only_a / images, only_b / images
    difference = only_a - only_b
    half = ndtri((1 + _LEVEL) / 2) * np.sqrt((only_a + only_b - difference**2) / images)
    return np.maximum(difference - half, -1), np.minimum(difference + half, 1)


def differ(differences: np.ndarray) -> np.ndarray:
    """Which radii differ by more than rounding."""
    return np.abs(differences) > _ROUNDING
