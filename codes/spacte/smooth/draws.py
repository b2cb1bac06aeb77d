"""How many noisy copies of an image are drawn, in which portions. Imports no torch: reading logs needs it, too."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

_FIRST_LOOK = 100  # draws before a stopping rule is first asked
ShouldStop = Callable[[np.ndarray, np.ndarray], bool]  # of the selection and the estimation votes [K]


@dataclass(frozen=True)
class Draws:
    """What is drawn for an image: n0 copies that select a class, then n that estimate its probability.

    `voter` is the row of the votes [V, K] that selects: -1, the last, is the ensemble. Selection and estimation are
    disjoint draws of one random stream, hence independent, as a certificate needs. `should_stop`, if given, gets that
    row's selection and estimation votes [K] and may end the estimation early. It is asked after 100 estimation draws,
    then each time after a quarter more (at least 100), but always after at most a batch. If `only_class` is given and
    another class is selected, nothing is drawn to estimate it. n0 = 0 selects nothing: all selection votes are 0.
    """

    n0: int
    n: int
    voter: int = -1
    should_stop: ShouldStop | None = None
    only_class: int | None = None

    def __post_init__(self) -> None:
        """ValueError if n0 or n is no integer, n0 is below 0 or n below 1."""
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
    """How many draws come next, of n of which `drawn` are done: a batch. If a stopping rule `looks` at the votes in
    between: 100, or a quarter of those drawn where that is more, but at most a batch.
    """
    size = min(batch_size, n - drawn)
    return min(size, max(_FIRST_LOOK, drawn // 4)) if looks else size
