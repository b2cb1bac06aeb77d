"""The files of one run over the test images, kept so that a kill at any moment loses at most the images under way.

<stem>.json              the configuration, one for all rows of the log
<stem>-counts.jsonl      the vote counts, a line an image: what was computed
<stem>.log               the log, a row an image: what follows from the counts
<stem>-ACR.log           the summary, written when the run is through
<stem>-part-<r>.jsonl    while several processes run: what process r has counted
"""

import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spacte.counts import Votes, read_votes
from spacte.utils import UserError, replace_file

_WAYS_OUT = "write to another folder to keep it, or give --overwrite to lose it"


@dataclass(frozen=True)
class Format:
    """How counts become a log: its header line, and a row from the votes and the configuration."""

    header: str
    row: Callable[[Votes, dict], str]


@dataclass(frozen=True)
class RunFiles:
    """The paths of a run's files, all in one folder."""

    log: Path

    def _beside(self, ending: str) -> Path:
        return self.log.with_name(self.log.name.removesuffix(".log") + ending)

    @property
    def counts(self) -> Path:
        """The vote counts."""
        return self._beside("-counts.jsonl")

    @property
    def json(self) -> Path:
        """The configuration, and about the run."""
        return self._beside(".json")

    @property
    def summary(self) -> Path:
        """ACR and certified accuracy."""
        return self._beside("-ACR.log")

    def part(self, rank: int) -> Path:
        """What process `rank` of several has counted."""
        return self._beside(f"-part-{rank}.jsonl")

    def parts(self) -> list[Path]:
        """The parts of an unfinished run of several processes."""
        stem = self._beside("-part-").name
        return sorted(path for path in self.log.parent.glob("*-part-*.jsonl") if path.name.startswith(stem))

    def read_json(self) -> dict:
        """{"config", "about"} of the run that made the log."""
        try:
            content = json.loads(self.json.read_text())
            return {"config": content["config"], "about": content["about"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{self.json}' beside the log is missing or no configuration") from error

    def check_configuration(self, config: dict) -> None:
        """UserError where files are there of a run with another configuration (the fields are named) or without one."""
        if self.json.exists():
            differences = config_differences(self.read_json()["config"], json.loads(json.dumps(config)))
            if differences:
                raise UserError(f"'{self.log}' has another configuration: {differences}; {_WAYS_OUT}")
        elif self.log.exists() or self.parts() or (self.counts.exists() and self.counts.stat().st_size):
            raise UserError(f"'{self.log}' or its counts exist without a configuration; {_WAYS_OUT}")

    def write_json(self, config: dict, about: dict, rows: int) -> None:
        """Note the configuration and `about`; what was noted of the run before it was interrupted, at `rows` rows,
        is kept under "earlier" where it differs.
        """
        if self.json.exists():
            noted, new = self.read_json()["about"], json.loads(json.dumps(about))
            earlier = noted.pop("earlier", [])
            if noted != new and rows:
                earlier = [*earlier, noted | {"rows": rows}]
            if earlier:
                about = about | {"earlier": earlier}
        content = json.dumps({"config": config, "about": about}, indent=2) + "\n"
        replace_file(self.json, lambda temporary: temporary.write_text(content))


class Ledger:
    """A run's files while they are written: rows in the order of idx, each one once.

    Opening it makes the files ready to be appended to. A line cut in half is dropped, a row that the log lacks is made
    from its counts, and what the processes of an unfinished run have counted is kept. Raises UserError where an earlier
    run's configuration differs (then no file is created or changed), where files do not belong together, and where
    another process is writing them.
    """

    def __init__(self, files: RunFiles, config: dict, about: dict, log_format: Format, overwrite: bool):
        self.files, self.config, self.format = files, config, log_format
        if not overwrite:
            files.check_configuration(config)  # before the lock's file is created, and again behind the lock
        self._lock()
        if overwrite:  # the votes first and the configuration last: a kill in between leaves nothing to be mixed up
            self._held.truncate(0)
            for path in (*files.parts(), files.log, files.summary, files.json):
                path.unlink(missing_ok=True)
        files.check_configuration(config)
        files.write_json(config, about, rows=len(files.counts.read_text().splitlines()))
        self.done = self._recover()
        self.last = self.done[-1].idx if self.done else -1  # what is written ends here
        self.remaining: list[int] = []
        self.waiting: dict[int, Votes] = {}  # counted, but a row before theirs is not
        self._offsets: dict[Path, int] = {}
        for path in files.parts():
            _drop_cut_line(path)

    def plan(self, indices: list[int]) -> list[int]:
        """Which of the indices, in ascending order, are still to be counted; rows come in that order."""
        self.remaining = [idx for idx in indices if idx > self.last]
        self.done += self.collect()
        return [idx for idx in self.remaining if idx not in self.waiting]

    def add(self, votes: Votes) -> list[Votes]:
        """Take in an image; returns those whose rows could be written now."""
        if votes.idx > self.last:
            self.waiting[votes.idx] = votes
        return self._write()

    def collect(self) -> list[Votes]:
        """Take in what the processes' parts hold by now; returns the images whose rows could be written."""
        written = []
        for path in self.files.parts():
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for line in whole.decode().splitlines():
                written += self.add(Votes.from_line(line))
        return written

    def close(self) -> None:
        """Remove the processes' parts once all that they hold is written."""
        if not self.remaining and not self.waiting:
            for path in self.files.parts():
                path.unlink()

    def _write(self) -> list[Votes]:
        written = []
        while self.remaining and self.remaining[0] in self.waiting:
            votes = self.waiting.pop(self.remaining.pop(0))
            append(self.files.counts, votes.to_line())  # first, so that its row can always be made again
            append(self.files.log, self.format.row(votes, self.config))
            self.last = votes.idx
            written.append(votes)
        return written

    def _lock(self) -> None:
        self._held = open(self.files.counts, "a")  # noqa: SIM115 - the lock is held until the process ends
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing '{self.files.log}'") from error

    def _recover(self) -> list[Votes]:
        log, counts = self.files.log, self.files.counts
        for path in (counts, log):
            _drop_cut_line(path)
        if not log.exists() or log.stat().st_size == 0:
            append(log, self.format.header)
        votes = read_votes(counts) if counts.exists() else []
        logged = [line.split("\t")[0] for line in log.read_text().splitlines()[1:]]
        counted = [str(one.idx) for one in votes]
        if logged != counted[: len(logged)]:
            raise UserError(f"'{log}' and '{counts}' do not belong together; {_WAYS_OUT}")
        for one in votes[len(logged) :]:
            append(log, self.format.row(one, self.config))
        return votes


def config_differences(earlier: dict, new: dict) -> str:
    """The fields in which two configurations differ, with both values; empty where they do not."""
    names = [name for name in {**earlier, **new} if earlier.get(name) != new.get(name)]
    return ", ".join(f"{name} ({earlier.get(name)} there, {new.get(name)} here)" for name in names)


def append(path: Path, line: str) -> None:
    """Add a line at the end of a file."""
    with open(path, "a") as file:
        file.write(line)


def _drop_cut_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
