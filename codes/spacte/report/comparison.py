"""Two certification logs compared image by image."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from spacte.logs.certlog import certified_at, certified_radius
from spacte.report.alike import certification_differences
from spacte.report.run import Run
from spacte.report.runs import labels
from spacte.report.table import latex, markdown, radius_names, reached_radii, records
from spacte.utils import UserError

_LEVEL = 0.95
# Student's t holds its level from here on. Simulated on the differences of the authors' CIFAR-10 logs (the three pairs
# of defences at each sigma; 30 to 57 % zeros) and of three pairs of our digits logs, its 95 % interval misses the mean
# in at most 9.9 % of samples of 10 images, 7.2 % of 20, 5.9 % of 50, 5.2 % of 500 (normal differences: 5 % always). On
# three of these pairs the percentile bootstrap misses it in up to 14, 11, 8 and 5 %, BCa in up to 19, 13, 9 and 6 %.
# Images on which the two agree tell little of the spread and are not counted: of 50 images with 40 zeros and a long
# tail, t misses 8.9 %.
FEWEST_DIFFERENT = 50
_ROUNDING = 1e-9  # of differences of radii, which have 6 digits


@dataclass(frozen=True)
class Comparison:
    """What the images that two runs share say of their difference, a minus b.

    `table` has a row for ACR, clean accuracy and the certified accuracy at each radius: both values on the shared
    images, their difference and its 95 % interval, from `low` to `high`; NaN for an ACR of which too few images tell,
    see `acr_interval`. `different` is the number of images whose radii differ, `only_a` and `only_b` are the idx that
    the other run has not, `settings` is how their certifications differ, as far as their configurations tell.
    """

    a: str
    b: str
    images: int
    different: int
    table: pd.DataFrame
    only_a: list[int]
    only_b: list[int]
    settings: str

    def sentences(self) -> str:
        """The difference of the ACRs in a plain sentence, and the images that it leaves out."""
        acr, names = self.table.iloc[0], f"'{self.a}' and '{self.b}'"
        low, high = acr["low"], acr["high"]
        if np.isnan(low):
            few = f"fewer than {FEWEST_DIFFERENT}" if self.different < FEWEST_DIFFERENT else "all by the same"
            says = f"No verdict on the ACRs of {names}: the difference is {acr['difference']:.3f}"
            interval = f"and the radii of {self.different} images differ, {few}"
        elif low <= 0 <= high:
            says = f"The ACRs of {names} do not differ measurably: the difference is {acr['difference']:.3f}"
        else:
            side = "higher" if low > 0 else "lower"
            says = f"The ACR of '{self.a}' is {side} by {abs(acr['difference']):.3f} than that of '{self.b}'"
            low, high = sorted((abs(low), abs(high)))
        if not np.isnan(low):
            interval = f"95 % interval {low:.3f} to {high:.3f} (paired t)"
        text = f"{says}, {interval}, on the same {self.images} images."
        for name, images in ((self.a, self.only_a), (self.b, self.only_b)):
            if images:
                text += (
                    f"\nLeft out, only in '{name}': {len(images)} image{'s' * (len(images) > 1)}, idx {_named(images)}."
                )
        if self.settings:
            text += f"\nThey were certified differently: {self.settings}."
        return text

    def text(self, style: str) -> str:
        """The sentences and the table as markdown or LaTeX; there, the sentences are comments."""
        comment = "% " if style == "latex" else ""
        lines = "".join(f"{comment}{line}\n" for line in self.sentences().splitlines())
        name = latex if style == "latex" else str
        table = self.table.rename(columns={"a": name(self.a), "b": name(self.b)})
        if style == "latex":
            return lines + table.to_latex(index=False, float_format="%.3f", na_rep="-").rstrip("\n")
        return f"{lines}\n{markdown(table)}"

    def rows(self) -> pd.DataFrame:
        """The table with the runs' names and the number of images in every row, to be put under others."""
        table = self.table.rename(columns={"a": "value_a", "b": "value_b"})
        return table.assign(a=self.a, b=self.b, images=self.images)

    def record(self) -> dict:
        """All of it for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "images": self.images,
            "different": self.different,
            "sentences": self.sentences(),
            "table": records(self.table),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "settings": self.settings,
        }


def compare(a: Run, b: Run, radii=None) -> Comparison:
    """Match two runs' images by idx; `radii` default to those that one of them reaches.

    Raises UserError where they share fewer than two images.
    The interval of the ACRs is `acr_interval`'s, those of the accuracies are `accuracy_interval`'s.
    """
    radii = reached_radii([a, b]) if radii is None else radii
    logs = [run.log.set_index("idx") for run in (a, b)]
    shared = logs[0].index.intersection(logs[1].index).sort_values()
    if len(shared) < 2:
        raise UserError(f"'{a.path}' and '{b.path}' have fewer than 2 images in common: there is nothing to compare")
    matched = [log.loc[shared] for log in logs]
    radius = [certified_radius(log) for log in matched]  # [images]
    certified = [certified_at(log, [0, *radii]) for log in matched]  # [1 + radii, images]
    differences = radius[0] - radius[1]
    intervals = [acr_interval(differences[None]), accuracy_interval(*certified)]
    low, high = (np.concatenate(ends) for ends in zip(*intervals, strict=True))
    a_mean, b_mean = (np.array([one.mean(), *many.mean(axis=1)]) for one, many in zip(radius, certified, strict=True))
    table = pd.DataFrame({"figure": ["ACR", "clean", *radius_names(radii)], "a": a_mean, "b": b_mean})
    table["difference"] = table["a"] - table["b"]
    table["low"], table["high"] = low, high
    only = [log.index.difference(shared).tolist() for log in logs]
    return Comparison(
        *labels([a, b]), len(shared), int(_differ(differences).sum()), table, *only, certification_differences(a, b)
    )


def acr_interval(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's 95 % interval of the mean of differences of radii: [F, images] -> low [F], high [F].

    NaN where fewer than FEWEST_DIFFERENT of the differences are not 0, and where all are equal. The level is
    approximate: where a few images of hundreds carry most of the difference, no interval of theirs holds.
    """
    images = differences.shape[1]
    mean, spread = differences.mean(axis=1), differences.std(axis=1, ddof=1)
    half = stats.t.ppf((1 + _LEVEL) / 2, images - 1) * spread / np.sqrt(images)
    half[(_differ(differences).sum(axis=1) < FEWEST_DIFFERENT) | (spread < _ROUNDING)] = np.nan
    return mean - half, mean + half


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
    half = stats.norm.ppf((1 + _LEVEL) / 2) * np.sqrt((only_a + only_b - difference**2) / images)
    return np.maximum(difference - half, -1), np.minimum(difference + half, 1)


def _differ(differences: np.ndarray) -> np.ndarray:
    return np.abs(differences) > _ROUNDING


def _named(images: list[int]) -> str:
    """0-4, 7, 20, 40, ..., 980: runs and steps of equal width are abbreviated, nothing is left out."""
    parts, rest = [], list(images)
    while rest:
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
    return ", ".join(parts)
