"""Certification logs as runs: what a log holds, and what is known of the classifier behind it."""

import itertools
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from spacte.data.spec import DATASETS
from spacte.logs.certlog import COLUMNS, first_line, read_log
from spacte.logs.from_votes import log_table, voter_of
from spacte.logs.runfiles import RunFiles
from spacte.logs.votes import read_counts
from spacte.utils import UserError

DESCRIPTION = (
    "defence",
    "dataset",
    "arch",
    "heads",
    "sigma",
    "certificate",
)  # the fields of a run that say which one it is
# the fields of a configuration in which the certifications of one classifier differ
CERTIFICATION = ("certificate", "N0", "N", "alpha", "sequential", "skip_wrong", "exact_noise", "precision")
_OTHER_KINDS = {"attack": "an attack log", "predict": "a prediction log"}


@dataclass(frozen=True)
class Run:
    """A certification log and what its configuration or else its path says of the classifier (None: neither does).

    `name` is the training run's, `place` its folders where the rest does not tell two runs apart.
    """

    name: str
    path: Path
    log: pd.DataFrame
    defence: str | None
    dataset: str | None
    arch: str | None
    heads: str | None
    sigma: float | None
    config: dict | None
    place: str = ""

    @property
    def certificate(self) -> str | None:
        """How votes became certificates: "cohen" or "all-votes"."""
        return None if self.config is None else self.config["certificate"]

    @property
    def title(self) -> str:
        """The name, and the place where it takes that to tell two runs apart."""
        return f"{self.name} ({self.place})" if self.place else self.name


def read_runs(paths: list[Path], heads: bool = False, certificate: str | None = None) -> list[Run]:
    """The runs of logs and of all certification logs in folders, in the order of a table.

    In a folder, attack and prediction logs are passed over. `heads` adds each head alone, from the vote counts beside a
    log of several heads; `certificate` makes all logs anew from their counts. Raises UserError that names the file, and
    the line where there is one: an unreadable log, counts that are missing, a path to an attack or prediction log,
    two data sets, images with two labels.
    """
    logs = list({log.resolve(): log for path in paths for log in _logs_in(path)}.values())
    runs = []
    for path in logs:
        run = Run(re.sub(r"-certify-skip-\d+", "", _parts(path)[-1]), path, read_log(path), **_description(path))
        if certificate is not None:
            run = with_certificate(run, certificate)
        runs += [*(_heads_alone(run) if heads else ()), run]
    check_same_images(runs)
    described = [(run.name, *(getattr(run, name) for name in DESCRIPTION)) for run in runs]
    if len(set(described)) < len(runs):
        places = dict(zip(logs, _differing(logs), strict=True))
        runs = [replace(run, place=places[run.path]) for run in runs]
    return sorted(runs, key=_order)


def _logs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        kind = _kind(path)
        if kind != "certify":
            raise UserError(f"'{path}' is {_OTHER_KINDS[kind]}: give a certification log")
        return [path]
    found = []
    for log in sorted(path.rglob("*")):
        if log.is_file() and os.access(log, os.R_OK):
            header, has_rows = _beginning(log)
            if set(COLUMNS[:-1]) <= header and _kind(log) == "certify":
                if has_rows:
                    found.append(log)
                else:
                    warnings.warn(f"'{log}' has no row yet: left out", stacklevel=2)
    if not found:
        raise UserError(f"folder '{path}' holds no certification log")
    return found


def _beginning(log: Path) -> tuple[set[str], bool]:
    """The columns that a file's first line names, and whether there is a second line."""
    with open(log, errors="replace") as file:
        return set(file.readline(1000).split()), bool(file.readline(1000))


def _kind(log: Path) -> str:
    """What the configuration beside a log says it is, or else its columns: "certify", "attack" or "predict".

    A file that is none of them is "certify": its reader says what is wrong with it.
    """
    try:
        kind = RunFiles(log).read_json()["config"]["kind"]
        if kind == "certify" or kind in _OTHER_KINDS:
            return kind
    except (UserError, KeyError, TypeError):
        pass  # no configuration of ours: the columns tell
    try:
        columns, _ = _beginning(log)
    except OSError:
        return "certify"
    if "attack_radius" in columns:
        return "attack"
    return "predict" if {"idx", "predict", "correct"} <= columns and "radius" not in columns else "certify"


def _differing(paths: list[Path]) -> list[str]:
    """The parts of each path, innermost last, in which the paths are not all the same."""
    parts = [_parts(path)[::-1] for path in paths]
    places = [place for place, found in enumerate(itertools.zip_longest(*parts)) if len(set(found)) > 1]
    return ["/".join(part[place] for place in reversed(places) if place < len(part)) for part in parts]


def _description(path: Path) -> dict:
    from_path = {
        "defence": _part(path, r"\d([A-Z]\w+)", str),
        "dataset": _known(path, DATASETS),
        "arch": _part(path, r"(?:.*-)?(R\d+)", str),
        "heads": _part(path, r"h-(\d+)-.*", str),
        "sigma": _part(path, r"(?:noise|sigma)[-_](\d+(?:\.\d+)?)", float),
    }
    config = _configuration(RunFiles(path))
    if config is None:
        return from_path | {"config": None}
    heads = "+".join(map(str, config["num_heads"]))
    return {
        "defence": printable(config.get("defence") or "") or from_path["defence"],
        "dataset": printable(config["dataset"]),
        "arch": printable(config["arch"]),
        "heads": heads if config["head"] is None else f"head {config['head']} of {heads}",
        "sigma": config["noise_sd"],
        "config": {"certificate": "cohen"} | config,  # older runs do not name it
    }


def _configuration(files: RunFiles) -> dict | None:
    """The configuration beside a log; None, with a warning where a JSON is there, if it does not describe a run."""
    if not files.json.exists():
        return None
    try:
        config = files.read_json()["config"]
        wrong = _wrong({"defence": None, **config}, _LEGAL)
        reason = f": {', '.join(wrong)} missing or wrong" if wrong else ""
    except (UserError, TypeError):
        wrong, reason = True, ""
    if wrong:
        warnings.warn(f"'{files.json}' is no configuration of ours{reason}; passed over", stacklevel=2)
    return None if wrong else config


def _wrong(config: dict, legal: dict[str, Callable]) -> list[str]:
    """The fields that a configuration lacks or whose values are not legal."""
    return [name for name, accept in legal.items() if name not in config or not accept(config[name])]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


_LEGAL = {  # what must be in a configuration for it to say which classifier was certified
    "dataset": lambda value: isinstance(value, str),
    "arch": lambda value: isinstance(value, str),
    "num_heads": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "noise_sd": lambda value: _is_number(value) and value > 0,
    "head": lambda value: value is None or _is_number(value),
    "defence": lambda value: value is None or isinstance(value, str),
}
_MAKES_CERTIFICATES = {  # and what else must be there to make certificates from votes
    "alpha": lambda value: _is_number(value) and 0 < value < 1,
    "noise_slack": lambda value: value == 0 or (_is_number(value) and 0 < value < 1),
    "sequential": lambda value: value is None or isinstance(value, dict),
    "skip_wrong": lambda value: isinstance(value, bool),
}


def _part(path: Path, pattern: str, kind: Callable):
    """What the pattern's group finds in the innermost part of the path that is like it."""
    for part in reversed(_parts(path)):
        match = re.fullmatch(pattern, part)
        if match:
            return kind(match[1])
    return None


def _parts(path: Path) -> tuple[str, ...]:
    """The path's folders and its name without .log, as text; a name like sigma_0.25 has no ending to lose."""
    return tuple(map(printable, (*path.absolute().parts[1:-1], path.name.removesuffix(".log"))))


def printable(text: str | Path) -> str:
    r"""The text with what UTF-8 cannot hold (bytes of a file's name that are none) as an escape, \udcff say."""
    return str(text).encode("utf-8", errors="backslashreplace").decode("utf-8")


def _known(path: Path, names) -> str | None:
    """The one of the names that is a part of the path, or a part of a part between hyphens (CIFAR10-R110)."""
    known = {name.lower(): name for name in names}
    for part in reversed(_parts(path)[:-1]):
        for word in part.lower().split("-"):
            if word in known:
                return known[word]
    return None


def with_certificate(run: Run, certificate: str) -> Run:
    """The run with the log that its counts give under a certificate ("cohen", "all-votes").

    Raises UserError where no counts or no configuration lie beside the log.
    """
    files = RunFiles(run.path)
    if run.config is None or not files.counts.exists():
        raise UserError(f"'{run.path}' has no vote counts or no configuration beside it: its certificates are fixed")
    config = run.config | {"certificate": certificate}
    return replace(run, log=log_table(_counts_behind(run), config), config=config)


def votes_of(run: Run) -> list[np.ndarray] | None:
    """Each image's estimation votes [K] for the run's voter, in the log's order; None where no counts tell."""
    if run.config is None or _wrong(run.config, _MAKES_CERTIFICATES) or not RunFiles(run.path).counts.exists():
        return None
    return [counts.estimation[voter_of(run.config)] for counts in _counts_behind(run)]


def label_probabilities(run: Run) -> np.ndarray:
    """Each image's probability under noise of its own class: the share of its estimation votes, [images].

    Without counts what the radius tells, a lower bound from 1/2 on, and 0 where the image is wrong or abstained.
    """
    votes = votes_of(run)
    if votes is not None:
        return np.array([one[label] / max(one.sum(), 1) for one, label in zip(votes, run.log["label"], strict=True)])
    if run.sigma is None:
        raise UserError(f"'{run.path}': neither votes nor sigma are known: its probabilities are not, either")
    right = run.log["correct"] == 1
    return np.where(right, norm.cdf(run.log["radius"] / run.sigma), 0.0)


def _counts_behind(run: Run) -> list:
    """The counts beside a log; UserError where they or the configuration are not this log's."""
    files = RunFiles(run.path)
    wrong = _wrong(run.config, _MAKES_CERTIFICATES)
    if wrong:
        raise UserError(f"'{files.json}': {', '.join(wrong)} missing or wrong: the counts cannot be certified")
    counts = read_counts(files.counts)
    if [one.idx for one in counts] != run.log["idx"].tolist():
        raise UserError(f"'{files.counts}' holds other images than '{run.path}'")
    return counts


def _heads_alone(run: Run) -> list[Run]:
    files = RunFiles(run.path)
    if run.heads == "1" or (run.heads or "").startswith("head"):
        return []
    if not files.counts.exists():
        warnings.warn(f"no vote counts lie beside '{run.path}': its heads alone are left out", stacklevel=2)
        return []
    config = run.config
    if config is None:
        warnings.warn(f"no configuration lies beside '{run.path}': its heads alone are left out", stacklevel=2)
        return []
    votes = _counts_behind(run)
    if config["skip_wrong"]:
        raise UserError(f"'{run.path}' was made with --skip_wrong: the heads alone were not counted on every image")
    alone = []
    for head in range(len(votes[0].selection) - 1):
        log = log_table(votes, config | {"head": head})
        alone.append(replace(run, log=log, heads=f"head {head} of {run.heads}", config=config | {"head": head}))
    return alone


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
    found = (run.config or {}).get("checkpoint_sha256")
    return {str(one) for one in found} if isinstance(found, list) else set()


def _order(run: Run) -> tuple:
    texts = (run.dataset or "", run.arch or "", run.sigma or 0.0, run.defence or "")
    return (*texts, "head" not in (run.heads or ""), len(run.heads or ""), run.heads or "", run.title)


def _heads_in_words(heads: str) -> str:
    """1 head, 5 heads, 5 networks (of one head each), 5+1 heads."""
    if "+" in heads and set(heads.split("+")) == {"1"}:
        return f"{heads.count('1')} networks"
    return f"{heads} head{'s' * (heads != '1')}"


def labels(runs: list[Run]) -> list[str]:
    """A short name for each run of a picture or a sentence: what is known of it, and where its log lies in a tie."""
    short = []
    for run in runs:
        heads = run.heads and (run.heads if "head" in run.heads else _heads_in_words(run.heads))
        parts = [run.defence, heads, run.sigma and f"sigma {run.sigma:g}"]
        for name in ("arch", "dataset", "certificate"):
            if len({getattr(other, name) for other in runs}) > 1:
                parts.append(getattr(run, name))
        short.append(", ".join(part for part in parts if part))
    for text in set(short):
        tied = [number for number, other in enumerate(short) if other == text]
        if len(tied) > 1 or not text:
            places = _differing([runs[number].path for number in tied])
            for number, place in zip(tied, places, strict=True):
                short[number] = f"{text} ({place})" if text else place or runs[number].title
    return short
