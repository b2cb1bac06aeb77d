"""An image whose votes are wanted, and its tally while they are drawn.

VoteRequest (what is wanted) -> Tally (the votes so far) -> Votes (the result)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from spacte.smooth.draws import Draws, portion
from spacte.utils import RunError


@dataclass(frozen=True, eq=False)
class VoteRequest:
    """An image x [C, H, W], the generator of its noise and what is drawn for it; `idx` is its place in a split."""

    x: Tensor
    generator: Generator | None
    draws: Draws
    idx: int = -1  # of no split

    def __post_init__(self) -> None:
        """ValueError if noise cannot be added."""
        if not isinstance(self.x, Tensor) or self.x.dtype not in (torch.float32, torch.float64):
            raise ValueError("an image must be a tensor of floating point numbers, float32 or float64")
        if not isinstance(self.generator, Generator | None):
            raise ValueError(f"the generator is a {type(self.generator).__name__}: it must be a torch.Generator")


@dataclass(frozen=True, eq=False)
class Votes:
    """The votes on an image, `selection` and `estimation` [V, K], and the `seconds` that they took.

    Images that were drawn together share the time in proportion to their noisy copies. `disagreed` is the number of
    copies on which the voters other than the ensemble (the last row) named different classes.
    """

    idx: int
    selection: np.ndarray
    estimation: np.ndarray
    seconds: float
    disagreed: int


class Tally:
    """The votes on an image while they are drawn, in portions of at most `batch_size` noisy copies.

    First come the draws of the selection, then those of the estimation. `next_portion` is how many copies are to be
    drawn next, 0 when the votes are complete. The caller draws them and calls `add` with their counts, which stay on
    the device. Where `must_read` is then true, it also fetches `counts()`, all counts so far, and calls `read` with
    them. `untimed` is the number of copies whose time is not in `seconds` yet.
    """

    def __init__(self, request: VoteRequest, batch_size: int, seconds: float = 0.0):
        self.request, self.batch_size, self.seconds, self.untimed = request, batch_size, seconds, 0
        self._generator_state = None if request.generator is None else request.generator.get_state()
        self._selection: np.ndarray | None = None
        self._estimation: np.ndarray | None = None
        # of the selection at first, then of the estimation
        self._counts: list[Tensor] = []
        self._drawn = self._disagreed = 0
        self.next_portion = self._portion()

    def restarted(self) -> "Tally":
        """A tally of the same request without any votes; its noise is the same if the generator is its own."""
        if self.request.generator is not None and self._generator_state is not None:
            self.request.generator.set_state(self._generator_state)
        return Tally(self.request, self.batch_size, self.seconds)

    def add(self, counts: Tensor) -> None:
        """Take the counts [V + 1, K + 1] of the portion, without waiting for the device."""
        self._counts.append(counts)
        self._drawn += self.next_portion
        self.untimed += self.next_portion
        self.next_portion = self._portion()

    @property
    def must_read(self) -> bool:
        """Whether it must read its votes before more are drawn: a phase ends or the stopping rule is asked."""
        return not self.next_portion or self._looks

    def counts(self) -> Tensor:
        """The counts so far of what is being drawn, on the device, [V + 1, K + 1]."""
        self._counts = [torch.stack(self._counts).sum(0)]
        return self._counts[0]

    def read(self, counts: np.ndarray) -> None:
        """Take the `counts` fetched from the device, and decide what is drawn next.

        Raises RunError if logits were not finite.
        """
        votes, draws = self._finite(counts[:-1]), self.request.draws
        if self.next_portion and not self._should_stop(votes):
            return  # the same draws are counted on
        self._disagreed += int(counts[-1, 1])
        if not self._selects:
            self.next_portion, self._estimation = 0, votes
            return
        # The estimation counts only fresh draws. The selection votes favour the class that they chose, so a bound
        # computed from them would not hold.
        self._selection, self._counts, self._drawn = votes, [], 0
        if draws.only_class in (None, int(votes[draws.voter].argmax())):
            self.next_portion = self._portion()
        else:
            self._estimation = np.zeros_like(votes)

    def votes(self) -> Votes:
        """The result, of a tally that is finished."""
        if self._estimation is None:
            raise RuntimeError("the votes are still being drawn")
        selection = np.zeros_like(self._estimation) if self._selection is None else self._selection
        return Votes(self.request.idx, selection, self._estimation, self.seconds, self._disagreed)

    @property
    def _selects(self) -> bool:
        return self._selection is None and self.request.draws.n0 > 0

    @property
    def _looks(self) -> bool:
        return not self._selects and self.request.draws.should_stop is not None

    def _portion(self) -> int:
        draws = self.request.draws
        return portion(self._drawn, draws.n0 if self._selects else draws.n, self.batch_size, self._looks)

    def _should_stop(self, votes: np.ndarray) -> bool:
        draws = self.request.draws
        selection = np.zeros_like(votes) if self._selection is None else self._selection
        return draws.should_stop is not None and bool(draws.should_stop(selection[draws.voter], votes[draws.voter]))

    def _finite(self, counts: np.ndarray) -> np.ndarray:
        """The votes [V, K] of the counts, whose last column is for logits that are not finite."""
        if counts[:, -1].any():
            name = "an image" if self.request.idx < 0 else f"image idx {self.request.idx}"
            wrong = f"{counts[:, -1].max()} of {self._drawn} noisy copies"
            raise RunError(f"the classifier's logits are not finite on {wrong} of {name}")
        return counts[:, :-1]
