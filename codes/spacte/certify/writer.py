"""A run's files while they are written: what is still missing, rows in the order of idx, each one once.

an image's counts -> its process's part file, where there are several -> the counts file -> its row of the log

The main process alone writes counts file and log, in order of idx, so that each is always the beginning of the whole. A
kill at any moment loses at most the images in progress.
"""

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TextIO

from tqdm import tqdm

from spacte.distributed import barrier, get_rank, get_world_size, on_main_process
from spacte.files import lock, make_folder, replace_file
from spacte.logs.counts import C, disagreement, read_counts
from spacte.logs.plans import Plan
from spacte.logs.runfiles import RunFiles
from spacte.utils import UserError

_SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal
_SECONDS_FOR_A_SLOW_FOLDER = 60  # for what one node has written to show on another


class RunWriter(Generic[C]):
    """Takes the counts of a run's images and keeps its files; in torchrun, the main process does.

    `writing` opens it. While it is open, `missing` are the images that this process has to count, and each is handed to
    `write`; when the block of `writing` ends, all rows of the run are written, and `summary` says what they amount to.
    """

    def __init__(self, missing: list[int], files: RunFiles, open_run: "_OpenRun[C] | None"):
        self.missing, self.files, self._open_run = missing, files, open_run  # None in all but the main process

    def write(self, *counts: C) -> None:
        """Take in the counts of an image, or of several at once."""
        if get_world_size() > 1:  # parts on disk, not messages: what a killed process has counted is not lost
            append(self.files.part(get_rank()), "".join(one.to_line() for one in counts))
            if self._open_run:
                self._open_run.show(self._open_run.collect())
        elif self._open_run:
            self._open_run.show(self._open_run.add(counts))

    def summary(self) -> str:
        """What is said of all images together, in the main process, and written where the plan keeps it; else ""."""
        if self._open_run is None:
            return ""
        plan, files = self._open_run.plan, self.files
        text = plan.summary(self._open_run.counts, files.log)
        if plan.keeps_summary:
            replace_file(files.summary, text + "\n")
        return text


@contextlib.contextmanager
def writing(
    files: RunFiles, plan: Plan[C], about: dict[str, Any], indices: list[int], overwrite: bool = False
) -> Iterator[RunWriter[C]]:
    """Make a run's files ready to be appended to, for the block; at its end all rows are written.

    A line cut in half is dropped, a row that the log lacks is made from its counts, and what the processes of an
    unfinished run have counted is kept. The `plan` says how counts become rows. Raises UserError, in every process,
    where an earlier run's configuration differs (then no file is created or changed), where files do not belong
    together or cannot be written, and where another process is writing them.

        with writing(files, plan, about, indices, overwrite) as writer:
            for counts in evaluation.count_votes(..., writer.missing, ...):
                writer.write(counts)
        print(writer.summary())
    """
    opened: list[_OpenRun[C]] = []  # by the main process

    def open_files() -> list[int]:
        opened.append(_OpenRun(files, plan, about, indices, overwrite))
        return opened[0].missing

    missing = on_main_process(open_files)
    try:
        yield RunWriter(missing[get_rank() :: get_world_size()], files, opened[0] if opened else None)
        barrier()
        on_main_process(lambda: opened[0].finish())
    finally:
        for one in opened:
            one.close()


class _OpenRun(Generic[C]):
    """The open files of a run, in the main process: locked from when this is made until it is closed.

    `counts` are those of the images whose rows are written, in their order; `missing` the images that were still to be
    counted at the beginning.
    """

    def __init__(self, files: RunFiles, plan: Plan[C], about: dict[str, Any], indices: list[int], overwrite: bool):
        self.files, self.plan = files, plan
        if not overwrite:
            files.check_configuration(plan.config)  # before any file is created, and again under the lock
        make_folder(files.log.parent)
        self._held = _locked(files, overwrite)
        try:
            self.counts: list[C] = _prepare_files(files, plan, about, self._held, overwrite)
            self._remaining = [idx for idx in reversed(indices) if idx > self._last]  # rows come from its end on
            self._waiting: dict[int, C] = {}  # counted, but a row before theirs is not
            self._offsets: dict[Path, int] = {}  # of what is read of the processes' parts
            self.collect()
            self.missing = [idx for idx in reversed(self._remaining) if idx not in self._waiting]
            if self.missing:  # a run that has nothing left to count keeps what is noted about it
                files.write_json(plan.config, about, rows=len(self.counts))
            beyond = {one.idx for one in self.counts}.difference(indices)
            if beyond:
                text = f"'{files.log}' holds images beyond --max ({len(beyond)}): they stay in its summary"
                warnings.warn(text, stacklevel=2)
            self._progress = _Progress(len(indices), self.counts, plan)
        except BaseException:
            self._held.close()
            raise

    @property
    def _last(self) -> int:
        """The idx of the last row written, or -1."""
        return self.counts[-1].idx if self.counts else -1

    def add(self, counts: Iterable[C]) -> list[C]:
        """Take in images; returns those whose rows could be written now."""
        self._waiting |= {one.idx: one for one in counts if one.idx > self._last}
        written = []
        while self._remaining and self._remaining[-1] in self._waiting:  # in order: a prefix of the rows is a valid log
            written.append(self._waiting.pop(self._remaining.pop()))
        if written:
            append(self.files.counts, "".join(one.to_line() for one in written))  # first: rows can be made again
            append(self.files.log, "".join(map(self.plan.rows, written)))
            self.counts += written
        return written

    def collect(self) -> list[C]:
        """Take in what the processes' parts hold by now; returns the images whose rows could be written."""
        written = []
        for path in self.files.parts():
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            try:
                found = [self.plan.from_line(line) for line in whole.decode(errors="replace").splitlines()]
            except UserError as error:
                raise UserError(f"'{path}' is damaged: {error}; remove it to count its images again") from error
            written += self.add(found)
        return written

    def show(self, written: list[C]) -> None:
        """Show that these images are done."""
        self._progress.add(written)

    def finish(self) -> None:
        """Write the rows that the other processes counted last, remove their parts, note what all rows amount to."""
        patience = time.monotonic() + _SECONDS_FOR_A_SLOW_FOLDER
        self.show(self.collect())
        while self._remaining and time.monotonic() < patience:
            time.sleep(1)
            self.show(self.collect())
        if self._remaining:
            folder, idx = self.files.log.parent, self._remaining[-1]
            raise UserError(f"'{folder}' is not one folder for all processes: idx {idx} is missing")
        if not self._waiting:
            for path in self.files.parts():
                path.unlink()
        found = disagreement(self.counts)
        if found is not None:
            self.files.note("consensus", found)

    def close(self) -> None:
        """Let another process write the files."""
        self._progress.close()
        self._held.close()


def _locked(files: RunFiles, overwrite: bool) -> TextIO:
    """The counts file, locked while it stays open."""
    counts = files.counts
    if counts.suffix == ".gz" and overwrite:
        counts = files.plain_counts
    elif counts.suffix == ".gz":
        raise UserError(f"'{counts}' is compressed: unpack it (gunzip) to resume the run")
    return lock(counts, f"another run is writing '{files.log}'")


def _prepare_files(files: RunFiles, plan: Plan[C], about: dict[str, Any], held: TextIO, overwrite: bool) -> list[C]:
    """Restore the files as they were after the last whole image, or empty them; returns the counts that they hold."""
    try:
        if overwrite:  # the votes first and the configuration last: a kill in between leaves nothing to be mixed up
            held.truncate(0)
            for path in (*files.parts(), files.packed_counts, files.log, files.summary, files.json):
                path.unlink(missing_ok=True)
        files.check_configuration(plan.config)
        if not files.json.exists():  # before the first count: no file is ever without a configuration
            files.write_json(plan.config, about, rows=0)
        counts = _recover_counts(files, plan)
        for path in files.parts():
            _drop_cut_line(path)
    except OSError as error:
        raise _cannot_write(Path(error.filename or files.log), error) from error
    return counts


def _recover_counts(files: RunFiles, plan: Plan[C]) -> list[C]:
    """The counts on disk, with the log that follows from them."""
    log = files.log
    for path in (files.counts, log):
        _drop_cut_line(path)
    if not log.exists() or log.stat().st_size == 0:
        append(log, plan.header)
    # the counts are the truth, the rows follow from them: a log that says otherwise was made by something else
    counts = read_counts(files.counts, plan.from_line)
    header, *logged = log.read_text(errors="replace").splitlines(keepends=True)
    expected = [line for one in counts for line in plan.rows(one).splitlines(keepends=True)]
    # without the last column, the time, which is not computed from the counts alone
    there, wanted = ([line.rpartition("\t")[0] for line in lines] for lines in (logged, expected))
    if header != plan.header or there != wanted[: len(there)]:
        raise files.mixed_error()
    for line in expected[len(logged) :]:
        append(log, line)
    return counts


class _Progress(Generic[C]):
    """A bar where there is a terminal, otherwise a line now and then: images done, time left, the metric so far."""

    def __init__(self, total: int, done: list[C], plan: Plan[C]):
        self.bar = tqdm(total=total, initial=len(done), unit="image", disable=None, dynamic_ncols=True)
        self.total, self.before, self.plan = total, len(done), plan
        self.images, self.sum = len(done), sum(map(plan.score, done))
        self.started = self.said = time.monotonic()

    def add(self, counts: list[C]) -> None:
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
    """Add lines at the end of a file. Raises UserError if that is not possible."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write '{path}': {error.strerror or error}; the files on disk are complete")


def _drop_cut_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
