"""Two certification logs compared image by image, or two experiments of several seeds each."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from spacte.logs.certlog import Radii, certified_at, certified_radius
from spacte.logs.table import decimals, plain, radius_names, records
from spacte.report.comparable import certification_differences, check_seeds
from spacte.report.labels import experiment_label, labels
from spacte.report.run import Run
from spacte.report.table import reached_radii
from spacte.utils import UserError

_LEVEL = 0.95
# Student's t holds its level from here on. Simulated on the differences of the authors' CIFAR-10 logs (the three pairs
# of defences at each sigma; 30 to 57 % zeros) and of three pairs of our digits logs, its 95 % interval misses the mean
# in at most 9.9 % of samples of 10 images, 7.2 % of 20, 5.9 % of 50, 5.2 % of 500 (normal differences: 5 % always). On
# three of these pairs the percentile bootstrap misses it in up to 14, 11, 8 and 5 %, BCa in up to 19, 13, 9 and 6 %.
# Images on which the two agree tell little of the spread and are not counted: of 50 images with 40 zeros and a long
# tail, t misses 8.9 %.
FEWEST_DIFFERENT = 50
_MOST_NAMED = 6  # runs of images in a sentence
_ROUNDING = 1e-9  # of differences of radii, which have 6 digits


@dataclass(frozen=True)
class Comparison:
    """What the images that two runs, or the runs of two experiments, share say of their difference, a minus b.

    `table` has a row for ACR, clean accuracy and the certified accuracy at each radius: both values on the shared
    images, their difference and its 95 % interval, from `low` to `high`; NaN for an ACR of which too few images tell,
    see `acr_interval`, or that the two runs' stopping rules make another thing, and for a radius that a sequential run
    did not decide. `different` is the number of images whose radii differ, `only_a` and `only_b` are the idx that the
    other run has not, `settings` is how their certifications differ, as far as their configurations tell, and
    `certificate` what kind both are ("": two kinds, or nothing tells). `seeds` are the numbers of runs of two
    experiments; None where two runs are compared. `stopping` are the rules by which the runs end their draws, where one
    of them is sequential: one rule if it is the same.
    """

    a: str
    b: str
    images: int
    different: int
    table: pd.DataFrame
    only_a: list[int]
    only_b: list[int]
    settings: str
    certificate: str = ""
    seeds: tuple[int, int] | None = None
    stopping: tuple[str, ...] = ()
    norm: str = "l2"

    def sentences(self) -> str:
        """The difference of the ACRs in a plain sentence, and what is to be known of it."""
        kind, _, top = self.certificate.partition(" ")
        words = ["from all votes"] * (kind == "all-votes") + [f"for {top}"] * bool(top)
        certificates = f", certificates {' '.join(words)}" if words else ""
        text = f"{self._verdict()}, on the same {self.images} images{certificates}."
        if len(self.stopping) == 1:
            text += f"\nBoth ended draws early (--sequential, {self.stopping[0]}): their ACRs are lower bounds."
        if self.seeds:
            text += "\nThe means over {} and {} runs are compared.".format(*self.seeds)
        for name, runs in zip((self.a, self.b), self.seeds or (), strict=False):
            if runs == 1:
                text += f"\nOf '{name}' there is one run: how much another would differ is not in the interval."
        for name, images in ((self.a, self.only_a), (self.b, self.only_b)):
            if images:
                text += (
                    f"\nLeft out, only in '{name}': {len(images)} image{'s' * (len(images) > 1)}, idx {_named(images)}."
                )
        if self.settings:
            text += f"\nThey were certified differently: {self.settings}."
        return text

    def _verdict(self) -> str:
        """What is said of the ACRs: a sentence without its end."""
        acr, names = self.table.iloc[0], f"'{self.a}' and '{self.b}'"
        acrs = "ACRs" if self.norm == "l2" else f"{self.norm.capitalize()} ACRs"
        difference, low, high = (f"{acr[name]:.{decimals(self.norm)}f}" for name in ("difference", "low", "high"))
        if len(self.stopping) > 1:
            rules = " and ".join(self.stopping)
            return (
                f"No verdict on the {acrs} of {names}: they stop by different rules ({rules}); the radii that both "
                "decide are compared"
            )
        if np.isnan(acr["low"]):
            few = f"fewer than {FEWEST_DIFFERENT}" if self.different < FEWEST_DIFFERENT else "all by the same"
            return (
                f"No verdict on the {acrs} of {names}: the first less the second is {difference}, and the radii of "
                f"{self.different} images differ, {few}"
            )
        if acr["low"] <= 0 <= acr["high"]:
            says = f"The {acrs} of {names} do not differ measurably"
        else:
            says = f"The {acrs[:-1]} of '{self.a}' is {'higher' if acr['low'] > 0 else 'lower'} than that of '{self.b}'"
        how = "paired t" if self.seeds is None else "t over images and seeds"
        return f"{says}: the first less the second is {difference}, 95 % interval {low} to {high} ({how})"

    def text(self, style: str) -> str:
        """The sentences and the table as markdown or LaTeX; there, the sentences are comments."""
        comment = "% " if style == "latex" else ""
        lines = "".join(f"{comment}{line}\n" for line in self.sentences().splitlines())
        table = plain(self.table.rename(columns={"a": self.a, "b": self.b}), style, decimals(self.norm))
        return lines + table if style == "latex" else f"{lines}\n{table}"

    def rows(self) -> pd.DataFrame:
        """The table with the runs' names, numbers and certificate in every row, to be put under others."""
        table = self.table.rename(columns={"a": "value_a", "b": "value_b"})
        runs_a, runs_b = self.seeds or (1, 1)
        return table.assign(
            a=self.a, b=self.b, certificate=self.certificate, norm=self.norm, images=self.images, runs_a=runs_a,
            runs_b=runs_b,
        )  # fmt: skip

    def record(self) -> dict:
        """All of it for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "images": self.images,
            "seeds": self.seeds,
            "certificate": self.certificate,
            "norm": self.norm,
            "stopping": self.stopping,
            "different": self.different,
            "sentences": self.sentences(),
            "table": records(self.table),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "settings": self.settings,
        }


def compare(a: Run, b: Run, radii: Radii | None = None) -> Comparison:
    """Match two runs' images by idx; `radii` default to those that one of them reaches.

    Raises UserError where they share fewer than two images.
    The interval of the ACRs is `acr_interval`'s, those of the accuracies are `accuracy_interval`'s.
    """
    radii = _radii([a, b]) if radii is None else radii
    shared, (only_a, only_b) = _shared_images(a, b)
    (radius_a, certified_a), (radius_b, certified_b) = (_figures(run, shared, radii) for run in (a, b))
    differences = radius_a - radius_b
    intervals = [acr_interval(differences[None]), accuracy_interval(certified_a, certified_b)]
    low, high = (np.concatenate(ends) for ends in zip(*intervals, strict=True))
    mean_a, mean_b = (
        np.array([radius.mean(), *certified.mean(axis=1)])
        for radius, certified in ((radius_a, certified_a), (radius_b, certified_b))
    )
    table, different = _table(a, b, radii, mean_a, mean_b, low, high), int(_differ(differences).sum())
    (name_a, name_b), settings = labels([[a], [b]]), _settings(a, b)
    return Comparison(name_a, name_b, len(shared), different, table, only_a, only_b, **settings)


def compare_experiments(a: list[Run], b: list[Run], radii: Radii | None = None) -> Comparison:
    """Compare the means of two experiments over their seeds, image by image; an experiment is a list of its runs.

    The intervals are `experiments_interval`'s, that of the ACRs under the same conditions as `compare`'s. Raises
    UserError where the runs of a list are not seeds of one experiment, or the two share fewer than two images.
    """
    for runs in (a, b):
        for run in runs[1:]:
            if run.described != runs[0].described:
                two = f"'{runs[0].path}' and '{run.path}'"
                raise UserError(f"{two} are not two seeds of one experiment: give the folder of one")
        check_seeds(runs)
    radii = _radii([*a, *b]) if radii is None else radii
    shared, (only_a, only_b) = _shared_images(a[0], b[0])
    figures_a, figures_b = (_figures_over_seeds(runs, shared, radii) for runs in (a, b))
    low, high = experiments_interval(figures_a, figures_b)
    differences = figures_a[0].mean(axis=0) - figures_b[0].mean(axis=0)
    different = int(_differ(differences).sum())
    if different < FEWEST_DIFFERENT:
        low[0] = high[0] = np.nan
    table = _table(a[0], b[0], radii, figures_a.mean(axis=(1, 2)), figures_b.mean(axis=(1, 2)), low, high)
    name_a, name_b = (
        experiment_label(runs) or label for runs, label in zip((a, b), labels([a[:1], b[:1]]), strict=True)
    )
    seeds, settings = (len(a), len(b)), _settings(a[0], b[0])
    return Comparison(name_a, name_b, len(shared), different, table, only_a, only_b, seeds=seeds, **settings)


def _settings(a: Run, b: Run) -> dict[str, Any]:
    """How the certifications differ, what both are, and how the runs end draws."""
    one, other = (run.config.sequential if run.config else None for run in (a, b))
    rules: tuple[str, ...] = (str(one or "a fixed N"), str(other or "a fixed N"))
    if one == other and (one is None or one.decides):
        rules = () if one is None else rules[:1]
    return {
        "settings": certification_differences(a, b),
        "certificate": (a.certificate or "") if a.certificate == b.certificate else "",
        "norm": a.norm,
        "stopping": rules,
    }


def _radii(runs: list[Run]) -> np.ndarray:
    """Those that one of the runs reaches, and those by which one of them stops."""
    radii = set(reached_radii(runs).tolist())
    for run in runs:
        if run.config and run.config.sequential:
            radii |= {radius * run.per_l2 for radius in run.config.sequential.radii or () if radius}
    return np.array(sorted(radii))


def _shared_images(a: Run, b: Run) -> tuple[pd.Index, list[list[int]]]:
    """The idx that both runs have, and those that only one has."""
    images = [pd.Index(run.log["idx"]) for run in (a, b)]
    shared = images[0].intersection(images[1]).sort_values()
    if len(shared) < 2:
        raise UserError(f"'{a.path}' and '{b.path}' have fewer than 2 images in common: there is nothing to compare")
    return shared, [one.difference(shared).tolist() for one in images]


def _figures(run: Run, images: pd.Index, radii: Radii) -> tuple[np.ndarray, np.ndarray]:
    """The certified radii [images], and whether each is certified at 0 and at the radii, [1 + radii, images]."""
    log = run.log.set_index("idx").loc[images]
    return certified_radius(log), certified_at(log, [0, *radii])


def _figures_over_seeds(runs: list[Run], images: pd.Index, radii: Radii) -> np.ndarray:
    """[2 + radii, seeds, images]: what the rows of a comparison's table are means of."""
    figures = [_figures(run, images, radii) for run in runs]
    return np.stack([np.stack([radius, *certified.astype(float)]) for radius, certified in figures], axis=1)


def _table(
    a: Run, b: Run, radii: Radii, mean_a: np.ndarray, mean_b: np.ndarray, low: np.ndarray, high: np.ndarray
) -> pd.DataFrame:
    """The figures of a comparison, NaN where a run does not tell."""
    names = ["ACR", "clean", *radius_names(radii, a.norm)]
    sides = {"a": mean_a.copy(), "b": mean_b.copy()}
    for run, means in zip((a, b), sides.values(), strict=True):
        means[1:][~run.tells([0, *radii])] = np.nan
    table = pd.DataFrame({"figure": names, **sides, "difference": sides["a"] - sides["b"], "low": low, "high": high})
    table.loc[table["difference"].isna(), ["low", "high"]] = np.nan
    if len(_settings(a, b)["stopping"]) > 1:
        table.loc[0, ["difference", "low", "high"]] = np.nan
    return table


def acr_interval(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's 95 % interval of the mean of differences of radii: [F, images] -> low [F], high [F].

    NaN where fewer than FEWEST_DIFFERENT of the differences are not 0, and where all are equal. The level is
    approximate: where a few images of hundreds carry most of the difference, no interval of theirs holds.
    """
    images = differences.shape[1]
    mean, spread = differences.mean(axis=1), differences.std(axis=1, ddof=1)
    half = stdtrit(images - 1, (1 + _LEVEL) / 2) * spread / np.sqrt(images)
    half[(_differ(differences).sum(axis=1) < FEWEST_DIFFERENT) | (spread < _ROUNDING)] = np.nan
    return mean - half, mean + half


def interval_over_seeds(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences [seeds, images]: over images, and over seeds if several.

    NaN where fewer than FEWEST_DIFFERENT images differ, averaged over the seeds, and where all differ alike.
    """
    if differences.shape[1] < 2 or int(_differ(differences.mean(axis=0)).sum()) < FEWEST_DIFFERENT:
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


def _differ(differences: np.ndarray) -> np.ndarray:
    return np.abs(differences) > _ROUNDING


def _named(images: list[int]) -> str:
    """0-4, 7, 20, 40, ..., 980: runs and steps of equal width are abbreviated; after some of them, how many more."""
    parts: list[str] = []
    rest = list(images)
    while rest and len(parts) < _MOST_NAMED:
        step = rest[1] - rest[0] if len(rest) > 1 else 0
        count = 1
        while count < len(rest) and rest[count] - rest[count - 1] == step:
            count += 1
        if count < 4:
            count = 1
        if count == 1:
            parts.append(str(rest[0]))
        elif step == 1:
            parts.append(f"{rest[0]}-{rest[count - 1]}")
        else:
            parts.append(f"{rest[0]}, {rest[1]}, ..., {rest[count - 1]}")
        rest = rest[count:]
    more = f" and {len(rest)} more (all of them with --format json)" if rest else ""
    return ", ".join(parts) + more
