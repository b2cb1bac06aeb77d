"""A run over the test images: which ones, in which process, where it goes on, what it says meanwhile."""

import re
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from spacte import cli
from spacte.counts import Votes
from spacte.processes import process_count, process_rank, share_from_main_process, wait_for_processes
from spacte.runfiles import Ledger, RunFiles, append
from spacte.utils import UserError, make_folder

_SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal
_SECONDS_FOR_A_SLOW_FOLDER = 60  # for what one node has written to show on another


def add_flags(parser: cli.Parser) -> None:
    """The flags that say how a run is divided and continued."""
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="the I-th of N jobs that share the run, from 1/N")
    parser.add_argument("--overwrite", action="store_true", help="start the log anew instead of going on where it ends")


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentTypeError(f"'{text}' must be I/N with 1 <= I <= N")
    return int(match[1]), int(match[2])


def planned_indices(images: int, skip: int, limit: int | None, shard: tuple[int, int] | None) -> list[int]:
    """The test images of a run: every skip-th below `limit`; of these, every N-th from the I-th for the shard I/N.

    Raises UserError where the shard has none.
    """
    indices = list(range(0, min(images, limit or images), skip))
    if shard is not None:
        indices = indices[shard[0] - 1 :: shard[1]]
        if not indices:
            raise UserError("--shard {}/{} has no image: the run is too small for so many".format(*shard))
    return indices


def run_files(folder: Path, name: str, args: Namespace) -> RunFiles:
    """The files of a run called `name`, or of its shard."""
    shard = "" if args.shard is None else "-shard-{}-of-{}".format(*args.shard)
    return RunFiles(folder / f"{name}{shard}.log")


def sweep(
    indices: list[int],
    files: RunFiles,
    open_ledger: Callable[[], Ledger],
    count: Callable[[list[int]], Iterator[Votes]],
    mean_gain: Callable[[list[Votes]], float],
    gain_name: str,
) -> None:
    """Count every image that is not counted yet, dealt out among the processes, and keep the run's files.

    `count(indices)` yields the images' votes as they come; `mean_gain` of all images so far is the progress's figure
    `gain_name`. Raises UserError, in every process, where `open_ledger` does.
    """
    ledger: Ledger | None = None

    def begin() -> list[int]:
        """Open the ledger; returns the idx that are still to be counted. UserError as `open_ledger`."""
        nonlocal ledger
        make_folder(files.log.parent)
        ledger = open_ledger()
        return ledger.plan(indices)

    todo = share_from_main_process(begin)
    progress = _Progress(len(indices), ledger.done, mean_gain, gain_name) if ledger else None
    try:
        for votes in count(todo[process_rank() :: process_count()]):
            if process_count() > 1:
                append(files.part(process_rank()), votes.to_line())
            if ledger:
                progress.add(ledger.collect() if process_count() > 1 else ledger.add(votes))
        wait_for_processes()
        share_from_main_process(lambda: _finish(ledger, progress, files))
    finally:
        if progress:
            progress.close()


def _finish(ledger: Ledger, progress: "_Progress", files: RunFiles) -> None:
    """Write the rows that the other processes counted last."""
    patience = time.monotonic() + _SECONDS_FOR_A_SLOW_FOLDER
    progress.add(ledger.collect())
    while ledger.remaining and time.monotonic() < patience:
        time.sleep(1)
        progress.add(ledger.collect())
    if ledger.remaining:
        raise UserError(
            f"'{files.log.parent}' is not one folder for all processes: idx {ledger.remaining[0]} is missing"
        )
    ledger.close()


class _Progress:
    """A bar where there is a terminal, otherwise a line now and then: images done, time left, the mean gain so far."""

    def __init__(self, images: int, done: list[Votes], mean_gain: Callable[[list[Votes]], float], name: str):
        self.bar = tqdm(total=images, initial=len(done), unit="image", disable=None, dynamic_ncols=True)
        self.total, self.before, self.mean_gain, self.name = images, len(done), mean_gain, name
        self.images, self.sum = len(done), mean_gain(done) * len(done) if done else 0.0
        self.started = self.said = time.monotonic()

    def add(self, votes: list[Votes]) -> None:
        """Show that these images are done."""
        if not votes:
            return
        self.images += len(votes)
        self.sum += self.mean_gain(votes) * len(votes)
        mean = f"{self.sum / self.images:.3f}"
        self.bar.set_postfix({self.name: mean})
        self.bar.update(len(votes))
        now = time.monotonic()
        if self.bar.disable and now - self.said >= _SECONDS_BETWEEN_LINES:
            self.said = now
            left = round((now - self.started) / (self.images - self.before) * (self.total - self.images))
            line = f"{self.images}/{self.total} images  {self.name} {mean}  {timedelta(seconds=left)} left"
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
