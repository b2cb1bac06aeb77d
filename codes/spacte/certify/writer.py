"""A run's files while they are written: what is still missing, rows in the order of idx, each one once.

A kill at any moment loses at most the images in progress.
"""

import re
import time
import warnings
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from spacte.distributed import barrier, broadcast_object, get_rank, get_world_size
from spacte.logs.runfiles import RunFiles
from spacte.logs.votes import read_counts
from spacte.utils import UserError, lock, make_folder

_SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal
_SECONDS_FOR_A_SLOW_FOLDER = 60  # for what one node has written to show on another


class RunWriter:
    """Takes the counts of a run's images and keeps its files; in torchrun, the main process does.

    The `plan` (CertifyPlan, PredictPlan, AttackPlan) says how counts become rows. Entering makes the files ready to be
    appended to: a line cut in half is dropped, a row that the log lacks is made from its counts, and what the processes
    of an unfinished run have counted is kept. Raises UserError, in every process, where an earlier run's configuration
    differs (then no file is created or changed), where files do not belong together or cannot be written, and where
    another process is writing them.

        with RunWriter(files, plan, about, indices, overwrite) as writer:
            for counts in evaluation.sample(..., writer.missing, ...):
                writer.write(counts)
    """

    def __init__(self, files: RunFiles, plan, about: dict, indices: list[int], overwrite: bool = False):
        self.files, self.plan, self.about, self.indices, self.overwrite = files, plan, about, indices, overwrite
        self._files: _Files | None = None  # the main process's
        self._progress: _Progress | None = None

    def __enter__(self) -> "RunWriter":
        todo = broadcast_object(self._begin)
        self.missing = todo[get_rank() :: get_world_size()]  # the images that this process has to count
        return self

    def _begin(self) -> list[int]:
        self._files = _Files(self.files, self.plan, self.overwrite)
        try:
            self._files.make_ready(self.about, self.overwrite)
            todo = self._files.plan_for(self.indices)
            if todo:  # a run that has nothing left to count keeps what is noted about it
                self.files.write_json(self.plan.config, self.about, rows=len(self._files.done))
            beyond = {one.idx for one in self._files.done}.difference(self.indices)
            if beyond:
                text = f"'{self.files.log}' holds images beyond --max ({len(beyond)}): they stay in its summary"
                warnings.warn(text, stacklevel=2)
            self._progress = _Progress(len(self.indices), self._files.done, self.plan)
        except BaseException:
            self._files.unlock()
            raise
        return todo

    def write(self, counts) -> None:
        """Take in the counts of one image."""
        if get_world_size() > 1:  # parts on disk, not messages: what a killed process has counted is not lost
            append(self.files.part(get_rank()), counts.to_line())
            self._collect()
        elif self._files:
            self._progress.add(self._files.add(counts))

    def _collect(self) -> None:
        if self._files:
            self._progress.add(self._files.collect())

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                barrier()
                broadcast_object(self._finish)
        finally:
            if self._progress:
                self._progress.close()
            if self._files:
                self._files.unlock()

    def _finish(self) -> None:
        """Write the rows that the other processes counted last."""
        patience = time.monotonic() + _SECONDS_FOR_A_SLOW_FOLDER
        self._collect()
        while self._files.remaining and time.monotonic() < patience:
            time.sleep(1)
            self._collect()
        if self._files.remaining:
            folder, idx = self.files.log.parent, self._files.remaining[0]
            raise UserError(f"'{folder}' is not one folder for all processes: idx {idx} is missing")
        self._files.remove_parts()


class _Files:
    """The files of a RunWriter, in the main process: see there."""

    def __init__(self, files: RunFiles, plan, overwrite: bool):
        """Lock the files; nothing else is changed."""
        self.files, self.plan = files, plan
        self.remaining: list[int] = []
        self.waiting: dict[int, object] = {}  # counted, but a row before theirs is not
        self._offsets: dict[Path, int] = {}
        if not overwrite:
            files.check_configuration(plan.config)  # before any file is created, and again under the lock
        make_folder(files.log.parent)
        self._lock(overwrite)

    def make_ready(self, about: dict, overwrite: bool) -> None:
        """Let the files be as after the last whole image, or empty ones."""
        files, plan = self.files, self.plan
        try:
            if overwrite:  # the votes first and the configuration last: a kill in between leaves nothing to be mixed up
                self._held.truncate(0)
                for path in (*files.parts(), files.packed_counts, files.log, files.summary, files.json):
                    path.unlink(missing_ok=True)
            files.check_configuration(plan.config)
            if not files.json.exists():  # before the first count: no file is ever without a configuration
                files.write_json(plan.config, about, rows=0)
            self.done = self._recover()
            for path in files.parts():
                _drop_cut_line(path)
        except OSError as error:
            raise _cannot_write(Path(error.filename or files.log), error) from error
        self.last = self.done[-1].idx if self.done else -1  # what is written ends here

    def plan_for(self, indices: list[int]) -> list[int]:
        """Which of the indices, in ascending order, are still to be counted; rows come in that order."""
        self.remaining = [idx for idx in indices if idx > self.last]
        self.done += self.collect()
        return [idx for idx in self.remaining if idx not in self.waiting]

    def add(self, counts) -> list:
        """Take in an image; returns those whose rows could be written now."""
        if counts.idx > self.last:
            self.waiting[counts.idx] = counts
        written = []
        while self.remaining and self.remaining[0] in self.waiting:  # in order: a prefix of the rows is a valid log
            one = self.waiting.pop(self.remaining.pop(0))
            append(self.files.counts, one.to_line())  # first, so that its row can always be made again
            append(self.files.log, self.plan.rows(one))
            self.last = one.idx
            written.append(one)
        return written

    def collect(self) -> list:
        """Take in what the processes' parts hold by now; returns the images whose rows could be written."""
        written = []
        for path in self.files.parts():
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for line in whole.decode().splitlines():
                written += self.add(self.plan.from_line(line))
        return written

    def remove_parts(self) -> None:
        """Remove the processes' parts once all that they hold is written."""
        if not self.remaining and not self.waiting:
            for path in self.files.parts():
                path.unlink()

    def unlock(self) -> None:
        """Let another process write the files."""
        self._held.close()

    def _lock(self, overwrite: bool) -> None:
        counts = self.files.counts
        if counts.suffix == ".gz" and overwrite:
            counts = self.files.plain_counts
        elif counts.suffix == ".gz":
            raise UserError(f"'{counts}' is compressed: unpack it (gunzip) to resume the run")
        self._held = lock(counts, f"another run is writing '{self.files.log}'")

    def _recover(self) -> list:
        log, counts = self.files.log, self.files.counts
        for path in (counts, log):
            _drop_cut_line(path)
        if not log.exists() or log.stat().st_size == 0:
            append(log, self.plan.header)
        # the counts are the truth, the rows follow from them: a log that says otherwise was made by something else
        done = read_counts(counts, self.plan.from_line)
        header, *logged = log.read_text(errors="replace").splitlines(keepends=True)
        expected = [line for one in done for line in self.plan.rows(one).splitlines(keepends=True)]
        there, wanted = ([_without_time(line) for line in lines] for lines in (logged, expected))
        if header != self.plan.header or there != wanted[: len(there)]:
            raise self.files.mixed_error()
        for line in expected[len(logged) :]:
            append(log, line)
        return done


class _Progress:
    """A bar where there is a terminal, otherwise a line now and then: images done, time left, the metric so far."""

    def __init__(self, images: int, done: list, plan):
        self.bar = tqdm(total=images, initial=len(done), unit="image", disable=None, dynamic_ncols=True)
        self.total, self.before, self.plan = images, len(done), plan
        self.images, self.sum = len(done), sum(map(plan.score, done))
        self.started = self.said = time.monotonic()

    def add(self, counts: list) -> None:
        """Show that these images are done."""
        if not counts:
            return
        self.images += len(counts)
        self.sum += sum(map(self.plan.score, counts))
        mean = f"{self.sum / self.images:.3f}"
        self.bar.set_postfix({self.plan.metric: mean})
        self.bar.update(len(counts))
        now = time.monotonic()
        if self.bar.disable and now - self.said >= _SECONDS_BETWEEN_LINES:
            self.said = now
            left = round((now - self.started) / (self.images - self.before) * (self.total - self.images))
            line = f"{self.images}/{self.total} images  {self.plan.metric} {mean}  {timedelta(seconds=left)} left"
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def append(path: Path, text: str) -> None:
    """Add lines at the end of a file. Raises UserError where that is not possible."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write '{path}': {error.strerror or error}; what is on disk is whole")


def _without_time(line: str) -> str:
    """A row without its last column, the time, which is not computed from the counts alone."""
    return re.sub(r"\t[^\t]*$", "", line)


def _drop_cut_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
