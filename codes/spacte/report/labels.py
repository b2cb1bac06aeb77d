"""Short names for runs, and what tells their paths apart."""

import itertools
from pathlib import Path

from spacte.logs.described import parts_of
from spacte.report.run import Run


def labels(runs: list[Run]) -> list[str]:
    """A short name for each run of a picture or a sentence: what is known of it, and where its log lies in a tie."""
    short = []
    for run in runs:
        heads = run.heads and run.heads.in_words
        parts = [run.defence, heads, *run.variant, run.sigma and f"sigma {run.sigma:g}"]
        for name in ("arch", "dataset", "certificate"):
            if len({getattr(other, name) for other in runs}) > 1:
                parts.append(getattr(run, name))
        short.append(", ".join(part for part in parts if part))
    ties = places(short, runs)
    for number, (text, place) in enumerate(zip(short, ties, strict=True)):
        short[number] = f"{text} ({place})" if text and place else text or place or runs[number].title
    return short


def places(names: list, runs: list[Run]) -> list[str]:
    """For each run whose name another has too, in what the paths of their logs differ; "" for the others."""
    found = [""] * len(runs)
    for name in set(names):
        tied = [number for number, other in enumerate(names) if other == name]
        for number, place in zip(tied, differing_parts([runs[number].path for number in tied]), strict=True):
            found[number] = place
    return found


def differing_parts(paths: list[Path]) -> list[str]:
    """What tells each path from the others: its parts after the folders that all share, without those alike in all."""
    parts = [parts_of(path) for path in paths]
    folders = zip(*(part[:-1] for part in parts), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda found: len(set(found)) == 1, folders))
    parts = [part[shared:][::-1] for part in parts]  # innermost first: the paths may differ in depth
    places = [place for place, found in enumerate(itertools.zip_longest(*parts)) if len(set(found)) > 1]
    return ["/".join(part[place] for place in reversed(places) if place < len(part)) for part in parts]
