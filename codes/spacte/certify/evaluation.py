"""What certify, predict and attack evaluate: a smoothed classifier on the images of a split."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from spacte.data.splits import Split
from spacte.logs.config import RunConfig
from spacte.logs.counts import VoteCounts
from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import VoteRequest
from spacte.utils import derived_seed


@dataclass(frozen=True)
class Evaluation:
    """A smoothed classifier on its device, a split, usually the test one, and what a log must say of both (`config`).

    `batch_size` noisy copies share a batch; `training` holds the settings that each checkpoint was trained with.
    """

    smooth: Smooth
    split: Split
    device: torch.device
    batch_size: int
    run_name: str
    config: RunConfig
    training: list[dict[str, Any] | None]

    def generator(self, purpose: str, idx: int) -> torch.Generator:
        """The generator of image idx's noise: a function of (purpose, seed, idx) alone. What it draws on CUDA also
        depends on the card's number of multiprocessors, and on how many copies are drawn at once: the batch size.
        """
        # of the image's own, so that skips, shards and batches, which change the order of images, change no draw
        return torch.Generator(self.device).manual_seed(derived_seed(purpose, self.config.seed, idx))

    def count_votes(
        self, purpose: str, indices: Iterable[int], draws_of: Callable[[int], Draws]
    ) -> Iterator[VoteCounts]:
        """The votes of the images, in about their order; `draws_of(label)` says what is drawn for an image."""
        labels: dict[int, int] = {}

        def requests() -> Iterator[VoteRequest]:
            """Each image's request when it is its turn, so that few are in memory."""
            for idx in indices:
                image, labels[idx] = self.split[idx]
                yield VoteRequest(image, self.generator(purpose, idx), draws_of(labels[idx]), idx)

        for votes in self.smooth.count_many(requests(), self.batch_size):
            disagreed = votes.disagreed if self.smooth.consensus else None
            label = labels.pop(votes.idx)
            yield VoteCounts(votes.idx, label, votes.seconds, votes.selection, votes.estimation, disagreed)
