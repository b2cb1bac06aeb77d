"""Which runs may stand side by side: the same images, certified alike."""

import itertools
import json

import numpy as np

from spacte.logs.certlog import first_line
from spacte.report.run import Run
from spacte.utils import UserError

# the fields of a configuration in which the certifications of one classifier differ
CERTIFICATION = ("certificate", "N0", "N", "alpha", "sequential", "skip_wrong", "exact_noise", "precision")


def check_same_images(runs: list[Run]) -> None:
    """UserError that names file and line where the runs are about two data sets, or an image has two labels."""
    first: dict[int, tuple[int, Run]] = {}
    known = [run for run in runs if run.dataset]
    for run in runs:
        if known and run.dataset and run.dataset != known[0].dataset:
            there = f"'{known[0].path}', line 1: about {known[0].dataset}"
            raise UserError(f"two data sets in one report: '{run.path}', line 1: about {run.dataset}; {there}")
        earlier = run.log["idx"].map(lambda idx: first[idx][0] if idx in first else np.nan)
        other = earlier.notna() & (earlier != run.log["label"])
        if other.any():
            row = run.log[other].iloc[0]
            label, there = first[row["idx"]]
            raise UserError(
                f"two data sets in one report: '{run.path}', line {first_line(other)}: idx {row['idx']} has label "
                f"{row['label']}, but {label} in '{there.path}'"
            )
        for idx, label in zip(run.log["idx"], run.log["label"], strict=True):
            first.setdefault(idx, (label, run))


def certification_differences(a: Run, b: Run) -> str:
    """How two certifications differ, as far as both configurations tell: the fields, with both values."""
    if a.config is None or b.config is None:
        return ""
    pairs = [(name, a.config[name], b.config[name]) for name in CERTIFICATION if name in a.config and name in b.config]
    return ", ".join(f"{name} {one} and {other}" for name, one, other in pairs if one != other)


def comparable_groups(runs: list[Run]) -> list[int]:
    """The number, from 1, of each run's group: runs of one group certify the same images in the same way.

    The way is CERTIFICATION's fields; runs whose configurations lack one of them, or that have none, share a group only
    with their like. This alone decides which rows of a table are ranked against each other.
    """
    keys = [
        (frozenset(run.log["idx"]), json.dumps([(run.config or {}).get(name, "unknown") for name in CERTIFICATION]))
        for run in runs
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys), start=1)}
    return [numbers[key] for key in keys]


def check_seeds(runs: list[Run]) -> None:
    """UserError that names two of the runs where they are no two seeds of one experiment.

    They are not where they certify other images or with other settings, or where both are about one checkpoint. What a
    log without a configuration was made with is not known: its images alone are compared.
    """
    for a, b in itertools.combinations(runs, 2):
        differences = [certification_differences(a, b)]
        images = [set(run.log["idx"]) for run in (a, b)]
        if images[0] != images[1]:
            shared = len(images[0] & images[1])
            differences.append(f"{len(images[0])} and {len(images[1])} images, {shared} of them the same")
        twice = _checkpoints(a) & _checkpoints(b)
        if twice:
            differences.append(f"one checkpoint_sha256, {min(twice)}")
        found = ", ".join(filter(None, differences))
        if found:
            raise UserError(f"--over_seeds: '{a.path}' and '{b.path}' are not two seeds of one experiment: {found}")


def _checkpoints(run: Run) -> set[str]:
    config = run.config or {}
    found, parameters = config.get("checkpoint_sha256"), config.get("parameters_sha256")
    named = [*(found if isinstance(found, list) else ()), *([parameters] if parameters else ())]
    return {str(one) for one in named}
