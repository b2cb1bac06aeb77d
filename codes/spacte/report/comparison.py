"""Two certification logs compared image by image, or two experiments of several seeds each."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from spacte.logs.certlog import Radii, certified_at, certified_radius
from spacte.logs.table import as_text, radius_decimals, radius_names, records
from spacte.report.caveats import of_experiments, of_runs, seeds_are_few
from spacte.report.comparable import certification_differences, check_pair, check_seeds
from spacte.report.intervals import (
    FEWEST_DIFFERENT,
    Interval,
    accuracy_interval,
    concatenated,
    differ,
    experiments_interval,
    holm,
)
from spacte.report.labels import experiment_label, labels
from spacte.report.run import Run
from spacte.report.table import reached_radii
from spacte.utils import UserError

_MOST_NAMED = 6  # runs of images in a sentence


@dataclass(frozen=True)
class Comparison:
    """What the images that two runs, or the runs of two experiments, share say of their difference, a minus b.

    `table` has a row for ACR, clean accuracy and the certified accuracy at each radius: both values on the shared
    images, their difference, its 95 % interval from `low` to `high`, and the p-value of no difference, adjusted for all
    rows by Holm's method. Interval and p-value are NaN for the ACR if too few images' radii differ, see
    `experiments_interval`. If a run is sequential, they and the difference are NaN for the ACR, since two lower bounds
    tell nothing of a difference, and for each radius that it did not decide, or knows only to within a tolerance.

    `different` is the number of images whose radii differ. `only_a` and `only_b` are the idx that the other run does
    not have. `settings` says how the certifications differ, as far as the configurations tell; `certificate` is the
    kind of both ("": two kinds, or not known). `seeds` are the numbers of runs of two experiments; None where two runs
    are compared. If a run is sequential, `stopping` holds the rules by which draws end: one if both have the same.
    `remarks` are sentences on what the intervals do not account for.
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
    remarks: tuple[str, ...] = ()
    norm: str = "l2"

    def sentences(self) -> str:
        """The difference of the ACRs in a plain sentence, and what is to be known of it."""
        kind, _, top = self.certificate.partition(" ")
        words = ["from all votes"] * (kind == "all-votes") + [f"for {top}"] * bool(top)
        certificates = f", certificates {' '.join(words)}" if words else ""
        text = f"{self._verdict()}, on the same {self.images} images{certificates}."
        text += "".join(f"\n{remark}" for remark in self.remarks)
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
        difference, low, high = (
            f"{acr[name]:.{radius_decimals(self.norm)}f}" for name in ("difference", "low", "high")
        )
        if self.stopping:
            rules = " and ".join(self.stopping)
            how = "both end draws early" if len(self.stopping) == 1 else "they stop by different rules"
            return (
                f"No verdict on the {acrs} of {names}: {how} ({rules}), and nothing tells how far below the truth a "
                "lower bound is; the radii that both decide are compared"
            )
        if self.seeds is not None and seeds_are_few(self.seeds):
            return f"No verdict on the {acrs} of {names}: the first less the second is {difference}"
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
        table = as_text(self.table.rename(columns={"a": self.a, "b": self.b}), style, radius_decimals(self.norm))
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
        """The comparison as JSON."""
        fields = {name: value for name, value in vars(self).items() if name != "remarks"}
        return fields | {"sentences": self.sentences(), "table": records(self.table)}


def compare(a: Run, b: Run, radii: Radii | None = None) -> Comparison:
    """Match two runs' images by idx; `radii` default to those that one of them reaches.

    Raises UserError if they share fewer than two images, or these are perhaps others (two data_sha256).
    The interval of the ACRs is `experiments_interval`'s, those of the accuracies are `accuracy_interval`'s.
    """
    return _compared([a], [b], radii, over_seeds=False)


def compare_experiments(a: list[Run], b: list[Run], radii: Radii | None = None) -> Comparison:
    """Compare the means of two experiments over their seeds, image by image; an experiment is a list of its runs.

    The intervals are `experiments_interval`'s, that of the ACRs under the same conditions as `compare`'s. Raises
    UserError if the runs of a list are not seeds of one experiment, or the two share fewer than two images.
    """
    for runs in (a, b):
        for run in runs[1:]:
            if run.experiment_key != runs[0].experiment_key:
                two = f"'{runs[0].path}' and '{run.path}'"
                raise UserError(f"{two} are not two seeds of one experiment: give the folder of one")
        check_seeds(runs)
    return _compared(a, b, radii, over_seeds=True)


def _compared(a: list[Run], b: list[Run], radii: Radii | None, over_seeds: bool) -> Comparison:
    radii = reached_radii([*a, *b]) if radii is None else radii
    shared, (only_a, only_b) = _shared_images(a[0], b[0])
    figures_a, figures_b = (_figures(runs, shared, radii) for runs in (a, b))
    differences = figures_a[0].mean(axis=0) - figures_b[0].mean(axis=0)
    different, names = int(differ(differences).sum()), labels([a[:1], b[:1]])
    of_acr = experiments_interval(figures_a[:1], figures_b[:1])
    if over_seeds:
        of_accuracies = experiments_interval(figures_a[1:], figures_b[1:], proportions=True)
        names = [experiment_label(runs) or label for runs, label in zip((a, b), names, strict=True)]
        remarks = of_experiments((names[0], a), (names[1], b))
    else:
        of_accuracies = accuracy_interval(*(figures[1:, 0].astype(bool) for figures in (figures_a, figures_b)))
        remarks = of_runs(a[0], b[0])
    interval = concatenated(of_acr, of_accuracies)
    stopping = _stopping_rules(a[0], b[0])
    mean_a, mean_b = (figures.mean(axis=(1, 2)) for figures in (figures_a, figures_b))
    return Comparison(
        a=names[0],
        b=names[1],
        images=len(shared),
        different=different,
        table=_table(a[0], b[0], radii, mean_a, mean_b, interval, early=bool(stopping)),
        only_a=only_a,
        only_b=only_b,
        settings=certification_differences(a[0], b[0]),
        certificate=(a[0].certificate or "") if a[0].certificate == b[0].certificate else "",
        seeds=(len(a), len(b)) if over_seeds else None,
        stopping=stopping,
        remarks=tuple(remarks),
        norm=a[0].norm,
    )


def _stopping_rules(a: Run, b: Run) -> tuple[str, ...]:
    """The rules by which the runs end their draws, one if they are the same; none where N is fixed."""
    one, other = (run.config.sequential if run.config else None for run in (a, b))
    rules = tuple(run.stopping or ("a fixed N" if run.config else "an unknown one") for run in (a, b))
    if one == other and (one is None or one.decides):
        return () if one is None else rules[:1]
    return rules


def _shared_images(a: Run, b: Run) -> tuple[pd.Index, list[list[int]]]:
    """The idx that both runs have, and those that only one has. UserError as of `compare`."""
    check_pair(a, b)
    images = [pd.Index(run.log["idx"]) for run in (a, b)]
    shared = images[0].intersection(images[1]).sort_values()
    if len(shared) < 2:
        raise UserError(f"'{a.path}' and '{b.path}' have fewer than 2 images in common: there is nothing to compare")
    return shared, [one.difference(shared).tolist() for one in images]


def _figures(runs: list[Run], images: pd.Index, radii: Radii) -> np.ndarray:
    """What the rows of a comparison's table are means of, [2 + radii, runs, images]: the certified radii, and whether
    each image is certified at 0 and at the radii.
    """
    logs = [run.log.set_index("idx").loc[images] for run in runs]
    return np.stack([np.stack([certified_radius(log), *certified_at(log, [0, *radii])]) for log in logs], axis=1)


def _table(
    a: Run, b: Run, radii: Radii, mean_a: np.ndarray, mean_b: np.ndarray, interval: Interval, early: bool
) -> pd.DataFrame:
    """The figures of a comparison, NaN where a run does not tell; `early`: draws end early."""
    names = ["ACR", "clean", *radius_names(radii, a.norm)]
    sides = {"a": mean_a.copy(), "b": mean_b.copy()}
    for run, means in zip((a, b), sides.values(), strict=True):
        means[1:][~run.knows_radii([0, *radii])] = np.nan
    table = pd.DataFrame({"figure": names, **sides, "difference": sides["a"] - sides["b"], **vars(interval)})
    table.loc[table["difference"].isna(), ["low", "high", "p"]] = np.nan
    if early:
        exact = a.knows_radii_exactly([0, *radii]) & b.knows_radii_exactly([0, *radii])
        table.loc[[True, *~exact], ["difference", "low", "high", "p"]] = np.nan
    return table.assign(p=holm(table["p"].to_numpy())).rename(columns={"p": "p_holm"})


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
