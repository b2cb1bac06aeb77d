"""Two certification logs compared image by image."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from spacte.certlog import certified_at, certified_radius
from spacte.report import latex, markdown, radius_names, reached_radii, records
from spacte.runs import Run, certification_differences, labels
from spacte.utils import UserError

_RESAMPLES, _LEVEL, _SEED = 9999, 0.95, 0
_NUMBERS_AT_ONCE = 10**7  # of a resampling step: bounds its memory


@dataclass(frozen=True)
class Comparison:
    """What the images that two runs share say of their difference, a minus b.

    `table` has a row for ACR, clean accuracy and the certified accuracy at each radius: both values on the shared
    images, their difference and its 95 % bootstrap interval, from `low` to `high`. `only_a` and `only_b` are the idx
    that the other run has not, `settings` how their certifications differ, as far as their configurations tell.
    """

    a: str
    b: str
    images: int
    table: pd.DataFrame
    only_a: list[int]
    only_b: list[int]
    settings: str

    def sentences(self) -> str:
        """The difference of the ACRs in a plain sentence, and the images that it leaves out."""
        acr = self.table.iloc[0]
        low, high = acr["low"], acr["high"]
        if low <= 0 <= high:
            names = f"'{self.a}' and '{self.b}'"
            says = f"The ACRs of {names} do not differ measurably: the difference is {acr['difference']:.3f}"
        else:
            side = "higher" if low > 0 else "lower"
            says = f"The ACR of '{self.a}' is {side} by {abs(acr['difference']):.3f} than that of '{self.b}'"
            low, high = sorted((abs(low), abs(high)))
        interval = f"95 % interval {low:.3f} to {high:.3f} (paired bootstrap)"
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
            return lines + table.to_latex(index=False, float_format="%.3f").rstrip("\n")
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
            "sentences": self.sentences(),
            "table": records(self.table),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "settings": self.settings,
        }


def compare(a: Run, b: Run, radii=None) -> Comparison:
    """Match two runs' images by idx; `radii` default to those that one of them reaches.

    Raises UserError where they share fewer than two images.
    The interval is the percentile bootstrap's over images (9,999 resamples, the same for all rows, seeded).
    """
    radii = reached_radii([a, b]) if radii is None else radii
    logs = [run.log.set_index("idx") for run in (a, b)]
    shared = logs[0].index.intersection(logs[1].index).sort_values()
    if len(shared) < 2:
        raise UserError(f"'{a.path}' and '{b.path}' have fewer than 2 images in common: there is nothing to compare")
    matched = [log.loc[shared] for log in logs]
    figures = [np.vstack([certified_radius(log), certified_at(log, [0, *radii])]) for log in matched]  # [F, images]
    low, high = _interval(figures[0] - figures[1])
    a_mean, b_mean = (figure.mean(axis=1) for figure in figures)
    table = pd.DataFrame({"figure": ["ACR", "clean", *radius_names(radii)], "a": a_mean, "b": b_mean})
    table["difference"] = table["a"] - table["b"]
    table["low"], table["high"] = low, high
    only = [log.index.difference(shared).tolist() for log in logs]
    return Comparison(*labels([a, b]), len(shared), table, *only, certification_differences(a, b))


def _interval(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    batch = max(1, _NUMBERS_AT_ONCE // differences.size)
    found = bootstrap(
        (differences,), np.mean, axis=1, n_resamples=_RESAMPLES, confidence_level=_LEVEL, method="percentile",
        batch=batch, rng=np.random.default_rng(_SEED),
    )  # fmt: skip
    return found.confidence_interval


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
