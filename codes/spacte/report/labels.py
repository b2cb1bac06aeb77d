"""Names for runs: what the user called them, what is known of them, what tells their paths apart.

A run's `label` is the folders by which its log differs from the others':

    logs/5-heads/seed-1/CIFAR10/R8/noise-0.50/certify_mhead/h-5-....log  ->  5-heads/seed-1
    logs/1-head/seed-1/CIFAR10/R8/noise-0.50/certify_mhead/h-1-....log   ->  1-head/seed-1

Where two runs look alike nevertheless, each is told `apart` by its name, which holds flags, or else by its path. One
whose defence is not known has its `method` from folders. Pictures and sentences take a short name of all this:
`labels`.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spacte.logs.description import is_fact, is_seed, parts_of
from spacte.names import CERTIFICATIONS, run_tail
from spacte.report.run import Run


def labelled(runs: list[Run]) -> list[Run]:
    """The runs with what the user called them.

    Where two look alike nevertheless, their names by their flags stand there, too, or what tells their paths apart.
    """
    runs = [replace(run, label=label, apart="") for run, label in zip(runs, _user_labels(runs), strict=True)]
    runs = _told_apart(runs, [run.name for run in runs])
    return _told_apart(runs, _places([_shown_key(run) for run in runs], runs))


def _told_apart(runs: list[Run], by: list[str]) -> list[Run]:
    """The runs; those that look alike get their text of `by`, where these texts differ."""
    texts: dict[tuple, set[str]] = {}
    for run, text in zip(runs, by, strict=True):
        texts.setdefault(_shown_key(run), set()).add(text)
    return [
        replace(run, apart=text) if text and len(texts[_shown_key(run)]) > 1 else run
        for run, text in zip(runs, by, strict=True)
    ]


def _shown_key(run: Run) -> tuple:
    """What a table shows of a run."""
    return (run.title, *run.facts.values())


def with_methods(runs: list[Run]) -> list[Run]:
    """The runs, those of an unknown defence with the folders in which they differ: cat-rs/noise_0.25, cohen/..."""
    unknown = [run for run in runs if run.defence is None]
    folders = _differing([list(parts_of(run.path.parent)) for run in unknown]) if unknown else []
    methods = ("/".join(part for part in own if not (is_fact(part) or is_seed(part))) for own in folders)
    named = {id(run): method for run, method in zip(unknown, methods, strict=True)}
    return [replace(run, method=named.get(id(run), "")) for run in runs]


def _user_labels(runs: list[Run]) -> list[str]:
    """What the user called each run: the folders by which its log differs from the others', 5-heads/seed-1.

    Folders that say what the report says elsewhere, data set, architecture, sigma and defence, are no part of it; ""
    where nothing is left.
    """
    return ["/".join(rest) for rest in _differing([_own_folders(run) for run in runs])]


def _own_folders(run: Run) -> list[str]:
    said = rf"\d?{re.escape(run.defence)}|{CERTIFICATIONS}" if run.defence else CERTIFICATIONS
    folders = [part for part in parts_of(run.path)[:-1] if not re.fullmatch(said, part)]
    if run.config is None:
        return [part for part in folders if not is_fact(part)]
    facts = run_tail(run.config.dataset, run.config.arch, run.config.noise_sd).parts
    return [part for part in folders if part not in facts]


def labels(rows: Sequence[list[Run]]) -> list[str]:
    """A short name for each row of a picture or a sentence, a run or the seeds of an experiment.

    It is the user's label, followed by what runs of one label differ in, if all rows are then told apart. Otherwise it
    is what is known of the run and, for those that still are alike, the part in which their logs' paths differ.
    """
    runs, are_experiments = [some[0] for some in rows], any(len(some) > 1 for some in rows)
    found = [experiment_label(some) if are_experiments else some[0].label and some[0].title for some in rows]
    if all(found):
        found = _with_differences(found, runs)
    if not all(found) or len(set(found)) < len(found):
        found = _by_facts(runs)
    return [f"{label}, {len(some)} runs" if len(some) > 1 else label for label, some in zip(found, rows, strict=True)]


def _by_facts(runs: list[Run]) -> list[str]:
    """What is known of each run and, for those that still are alike, the part in which their logs' paths differ."""
    short = []
    for run in runs:
        heads = run.heads and run.heads.in_words
        parts = [run.defence, heads, *run.variant, run.sigma and f"sigma {run.sigma:g}"]
        for name in ("arch", "dataset", "certificate"):
            if len({getattr(other, name) for other in runs}) > 1:
                parts.append(getattr(run, name))
        short.append(", ".join(part for part in parts if part))
    named = zip(short, _places(short, runs), runs, strict=True)
    return [f"{text} ({place})" if text and place else text or place or run.title for text, place, run in named]


def _with_differences(user_labels: list[str], runs: list[Run]) -> list[str]:
    """The users' labels, with which head alone it is, and in what runs of one label differ."""
    named = []
    for user, run in zip(user_labels, runs, strict=True):
        alike = [other for label, other in zip(user_labels, runs, strict=True) if label == user]
        parts = [user, str(run.heads)] if run.heads and run.heads.head is not None else [user]
        if len({other.arch for other in alike}) > 1:
            parts.append(run.arch or "")
        if len({other.sigma for other in alike}) > 1:
            parts.append(f"sigma {run.sigma:g}" if run.sigma else "")
        if len({other.certificate for other in alike}) > 1:
            parts.append(run.certificate or "")
        named.append(", ".join(filter(None, parts)))
    return named


def experiment_label(runs: list[Run]) -> str:
    """What the labels of an experiment's runs have in common but a seed: 5-heads, of 5-heads/seed-1 and more."""
    first, *others = [run.label.split("/") for run in runs]
    shared = [part for part in first if all(part in other for other in others)]
    return "/".join(part for part in shared if not is_seed(part))


def _places(names: list, runs: list[Run]) -> list[str]:
    """For each run whose name another has too, in what the paths of their logs differ; "" for the others.

    Of logs in one folder it is how their names end.
    """
    found = [""] * len(runs)
    for name in set(names):
        tied = [number for number, other in enumerate(names) if other == name]
        for number, place in zip(tied, _endings(differing_parts([runs[number].path for number in tied])), strict=True):
            found[number] = place
    return found


def _endings(places: list[str]) -> list[str]:
    """What the names of files in one folder end in, after the words with which all begin: sequential, alpha-0.01."""
    if any("/" in place for place in places):
        return places
    words = [place.split("-") for place in places]
    shared = sum(1 for _ in itertools.takewhile(lambda found: len(set(found)) == 1, zip(*words, strict=False)))
    return ["-".join(one[shared:]) for one in words]


def differing_parts(paths: list[Path]) -> list[str]:
    """What tells each path from the others: its parts without those that all share, from the outside and the inside."""
    return ["/".join(rest) for rest in _differing([list(parts_of(path)) for path in paths])]


def _differing(parts: list[list[str]]) -> list[list[str]]:
    """The lists without the beginning and the end that all share.

    Paths that share no beginning come from unrelated folders, whose names mean nothing here: only as many of the
    innermost parts are kept, two or more, as tell them apart.
    """
    related = len({one[0] for one in parts if one}) <= 1
    for _ in range(2):  # the beginning, and, turned round, the end
        shared = itertools.takewhile(lambda found: len(set(found)) == 1, zip(*parts, strict=False))
        count = sum(1 for _ in shared)
        parts = [one[count:][::-1] for one in parts]
    if related:
        return parts
    different, lengths = len(set(map(tuple, parts))), range(2, max(map(len, parts)) + 1)
    enough = next((n for n in lengths if len({tuple(one[-n:]) for one in parts}) == different), 0)
    return [one[-enough:] for one in parts]


def natural(text: str) -> list[list[tuple[int, float, str]]]:
    """A key that sorts labels by their folders and numbers by size: seed-2 before seed-10, 0.03 before 0.2."""
    parts = [re.split(r"(\d+(?:\.\d+)?)", folder) for folder in text.split("/")]  # every other one is a number
    return [[(at % 2, float(part) if at % 2 else 0.0, part) for at, part in enumerate(one)] for one in parts]
