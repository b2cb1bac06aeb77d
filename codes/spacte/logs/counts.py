"""The vote counts of a run: one JSON line per image, from which its rows follow without a network."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from spacte.utils import UserError


class Counts(Protocol):
    """What was counted on one image, as a line of a counts file."""

    @property
    def idx(self) -> int:
        """The image's place in its split."""

    def to_line(self) -> str:
        """One JSON line."""


C = TypeVar("C", bound=Counts)


@dataclass(frozen=True)
class VoteCounts:
    """What was counted on one image: the votes `selection` and `estimation` [V, K] of V voters for K classes.

    The last row is the ensemble's, the rows before it are its heads' (with a consensus, its first members'); one head
    is its own ensemble, V = 1. Each row sums to the number of draws. A prediction selects no class: its `selection` is
    0. `disagreed` is the number of draws on which a consensus' first members disagreed; None without a consensus, and
    in older files.
    """

    idx: int
    label: int
    seconds: float
    selection: np.ndarray
    estimation: np.ndarray
    disagreed: int | None = None

    @property
    def draws(self) -> int:
        """How many noisy copies were drawn."""
        return int(self.selection[-1].sum() + self.estimation[-1].sum())

    def to_line(self) -> str:
        """One JSON line; a voter's counts are {class: votes} without the zeros."""
        fields = {"idx": self.idx, "label": self.label, "seconds": round(self.seconds, 6)}
        fields["classes"] = self.selection.shape[1]
        if self.disagreed is not None:
            fields["disagreed"] = self.disagreed
        return json.dumps(fields | {name: sparse(getattr(self, name)) for name in ("selection", "estimation")}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "VoteCounts":
        """The inverse of `to_line`. Raises UserError that says what is wrong if the line is not a vote count."""
        fields = parse_line(line)
        selection, estimation = (dense(fields.get(name), fields["classes"]) for name in ("selection", "estimation"))
        if len(selection) != len(estimation):
            raise UserError(f"not a vote count: {len(selection)} voters select and {len(estimation)} estimate")
        counts = cls(fields["idx"], fields["label"], fields["seconds"], selection, estimation, fields.get("disagreed"))
        disagreed = counts.disagreed
        if disagreed is not None and not (type(disagreed) is int and 0 <= disagreed <= counts.draws):
            raise UserError(f"not a vote count: the first disagreed on {disagreed} of {counts.draws} draws")
        return counts


@dataclass(frozen=True)
class AttackCounts:
    """What was counted on one image under attack: for each attack radius the moved image's votes [V, K].

    `predict` and `radius` are the certificate that is put to the test; `norms` and `seconds_each` [R] are the L2 norms
    that the attacks reached and the time they took.
    """

    idx: int
    label: int
    predict: int
    radius: float
    norms: list[float]
    votes: list[np.ndarray]
    seconds_each: list[float]

    def to_line(self) -> str:
        """One JSON line."""
        fields = {"idx": self.idx, "label": self.label, "seconds": round(sum(self.seconds_each), 6)}
        fields |= {"classes": self.votes[0].shape[1], "predict": self.predict, "radius": self.radius}
        attacks = [
            {"norm": norm, "seconds": round(took, 6), "votes": sparse(votes)}
            for norm, took, votes in zip(self.norms, self.seconds_each, self.votes, strict=True)
        ]
        return json.dumps(fields | {"attacks": attacks}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "AttackCounts":
        """The inverse of `to_line`. Raises UserError if the line is not a count of an attack."""
        fields = parse_line(line)
        try:
            norms, took = ([float(one[name]) for one in fields["attacks"]] for name in ("norm", "seconds"))
            votes = [dense(one["votes"], fields["classes"]) for one in fields["attacks"]]
            predict, radius = int(fields["predict"]), float(fields["radius"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a vote count of an attack: {error}") from error
        return cls(fields["idx"], fields["label"], predict, radius, norms, votes, took)


def heads_of(voters: int) -> int:
    """How many heads are among the voters of a count: one head is its own ensemble."""
    return max(voters - 1, 1)


def mean_draws(counts: list[VoteCounts]) -> float:
    """How many draws estimated an image's radius, on average over all images."""
    return float(np.mean([one.estimation[-1].sum() for one in counts]))


def sparse(votes: np.ndarray) -> list[dict[int, int]]:
    """Votes [V, K] as {class: votes} of each voter, without the zeros."""
    return [{k: n for k, n in enumerate(row) if n} for row in votes.tolist()]


def dense(voters: object, classes: int) -> np.ndarray:
    """The inverse of `sparse`, [V, K]. Raises UserError if the votes cannot have been counted together."""
    if not isinstance(voters, list) or not voters or not all(isinstance(votes, dict) for votes in voters):
        raise UserError("not a vote count: the votes must be a list with {class: votes} for each voter")
    table = np.zeros((len(voters), classes), dtype=np.int64)
    for row, votes in zip(table, voters, strict=True):
        for k, n in votes.items():
            # below 2^53, because bounds compute with doubles
            if not (k.isdecimal() and len(k) < 8 and int(k) < classes and type(n) is int and 0 < n < 2**53):
                raise UserError(f"not a vote count: class '{k:.20}' with {n!s:.20} votes, of {classes} classes")
            row[int(k)] = n
    if len(set(table.sum(1).tolist())) > 1:  # a line that was edited by hand would certify what was not drawn
        raise UserError("not a vote count: the voters' draws differ, although all count the same ones")
    return table


def parse_line(line: str) -> dict:
    """The fields of a JSON line with idx, label, seconds and classes. Raises UserError if one is wrong."""
    try:
        fields = json.loads(line, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a vote count: {error}") from error
    if not isinstance(fields, dict):
        raise UserError("not a vote count: a line must hold an object")
    for name, least, below in (("idx", 0, 2**53), ("classes", 1, 10**7), ("label", 0, 10**7)):
        value = fields.get(name)
        if type(value) is not int or value < least:
            raise UserError(f"not a vote count: {name} must be an integer of at least {least}, not {value!s:.40}")
        if value >= below:
            raise UserError(f"not a vote count: {name} {value!s:.40} is too large")
    if fields["label"] >= fields["classes"]:
        raise UserError(f"not a vote count: label {fields['label']} of {fields['classes']} classes")
    if type(fields.get("seconds")) not in (int, float) or not fields["seconds"] >= 0:
        raise UserError(f"not a vote count: seconds must be a number of at least 0, not {fields.get('seconds')!s:.40}")
    return fields


def _without_duplicates(pairs: list[tuple]) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def disagreement(counts: Iterable[Counts]) -> dict[str, Any] | None:
    """On how many copies a consensus' first members disagreed, of how many that were seen, and the share.

    All images count that say so; None where none does.
    """
    known = [(one.disagreed, one.draws) for one in counts if isinstance(one, VoteCounts) and one.disagreed is not None]
    disagreed, seen = (sum(numbers) for numbers in zip(*known, strict=True)) if known else (0, 0)
    return {"disagreed": disagreed, "seen": seen, "share": disagreed / seen} if seen else None


@overload
def read_counts(path: Path) -> list[VoteCounts]: ...


@overload
def read_counts(path: Path, from_line: Callable[[str], C]) -> list[C]: ...


def read_counts(path: Path, from_line: Callable[[str], Any] = VoteCounts.from_line) -> list[Any]:
    """Every image of a counts file (of a compressed one where its name ends in .gz), in its order.

    A last line without its end, which is being written, is left out. Raises UserError that names the file and the line
    where one is not a vote count or an image comes twice.
    """
    counts, seen, text = [], set(), read_text(path)
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            one = from_line(line)
            if one.idx in seen:
                raise UserError(f"idx {one.idx} occurs twice")
        except UserError as error:
            raise UserError(f"'{path}', line {number}: {error}") from error
        seen.add(one.idx)
        counts.append(one)
    return counts


def read_text(path: Path) -> str:
    """The text of a counts file, compressed or not. Raises UserError if it cannot be read."""
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes()).decode()
        return path.read_text()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read vote counts '{path}': {getattr(error, 'strerror', None) or error}") from error
