"""What is drawn for an image, and in which portions. Needs no torch: plans are made of it where logs are read."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

_FIRST_LOOK = 100  # draws before a stopping rule is first asked
ShouldStop = Callable[[np.ndarray, np.ndarray], bool]  # of the selection and the estimation votes [K]


@dataclass(frozen=True)
class Draws:
    """What is drawn for an image: n0 copies that select `voter`'s class, then n that estimate its probability.

    The two are disjoint draws of one stream, hence independent, as a certificate needs. `should_stop`, if given, is
    asked with the voter's selection and estimation votes [K] after 100 estimation draws, or a batch if that is smaller,
    then whenever a quarter more (at most a batch) has been drawn, and may end the estimation early. Where another class
    than `only_class` is selected, nothing is drawn to estimate it. n0 = 0 selects nothing: all selection votes are 0.
    """

    n0: int
    n: int
    voter: int = -1
    should_stop: ShouldStop | None = None
    only_class: int | None = None

    def __post_init__(self) -> None:
        """ValueError if nothing is drawn, or no whole number."""
        object.__setattr__(self, "n0", whole("n0", self.n0))
        object.__setattr__(self, "n", whole("n", self.n))
        if self.n0 < 0 or self.n < 1:
            raise ValueError(f"n0 {self.n0} and n {self.n}: they must be at least 0 and 1")


def whole(name: str, value: SupportsIndex) -> int:
    """The value as Python's integer; ValueError if it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} {value!r}: it must be an integer") from None


def portion(drawn: int, n: int, batch_size: int, looks: bool) -> int:
    """How many of n draws come next: a batch; for a rule that `looks` in between, 100 first, then a quarter more."""
    size = min(batch_size, n - drawn)
    return min(size, max(_FIRST_LOOK, drawn // 4)) if looks else size
