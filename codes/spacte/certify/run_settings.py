"""Which images a run has, where its files go, and the flags that say so. Needs no torch: shards are merged with it."""

import re
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass

from spacte import cli
from spacte.logs.config import RunConfig
from spacte.logs.runfiles import RunFiles, folder_of
from spacte.utils import UserError


@dataclass(frozen=True)
class RunSettings:
    """Which images, in which job, and where the files go; the flags of `add_run_flags` say what each is."""

    skip: int = 1
    max: int | None = None
    shard: tuple[int, int] | None = None
    logs_dir: str = "./logs"
    overwrite: bool = False

    def chosen(self, candidates: Iterable[int]) -> list[int]:
        """The run's images: every skip-th below `max`; of these, every N-th from the I-th for the shard I/N.

        Raises UserError if there is none.
        """
        indices = [idx for idx in candidates if idx % self.skip == 0 and (self.max is None or idx < self.max)]
        if not indices:
            raise UserError(f"no image is chosen by --skip {self.skip} and --max {self.max}")
        if self.shard is not None:
            indices = indices[self.shard[0] - 1 :: self.shard[1]]
            if not indices:
                raise UserError("--shard {}/{} has no image: the run is too small for so many".format(*self.shard))
        return indices

    def files(self, config: RunConfig, script: str, name: str) -> RunFiles:
        """The files of a run called `name`, or of its shard."""
        return RunFiles(folder_of(config, self.logs_dir, script) / f"{name}{shard_ending(self.shard)}.log")


def add_run_flags(parser: cli.Parser) -> None:
    """The flags of RunSettings."""
    add = parser.add_argument_group("which images, where the log goes").add_argument
    add("--skip", type=cli.positive_int, help="every skip-th image: 0, skip, 2 skip, ...")
    add("--max", type=cli.positive_int, help="only images whose idx is below this")
    add("--shard", type=_shard, metavar="I/N", help="the I-th of N jobs that share the run, from 1/N")
    add("--logs_dir", help="logs: <logs_dir>/<dataset>/<arch>/noise-<sd>/")
    add("--overwrite", action="store_true", help="start the log from scratch instead of resuming where it ends")
    parser.set_defaults(**cli.defaults_of(RunSettings))


def shard_ending(shard: tuple[int, int] | None) -> str:
    """What the names of a shard's files end in."""
    return "" if shard is None else "-shard-{}-of-{}".format(*shard)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentTypeError(f"'{text}' must be I/N with 1 <= I <= N")
    return int(match[1]), int(match[2])
