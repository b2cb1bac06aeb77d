"""A queue at work: jobs that are not finished become running ones, until none is left.

jobs -> running jobs -> finished or failed
"""

import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

from tqdm import tqdm

from spacte.files import make_folder, replace_file
from spacte.jobs.gpus import gpu_of
from spacte.jobs.job import (
    Job,
    certify_command,
    check_unchanged,
    is_finished,
    last_line,
    read_record,
    remove_old_checkpoints,
    train_command,
    write_record,
)
from spacte.processes import set_priority_and_end
from spacte.utils import RunError, UserError

_SECONDS_BETWEEN_LINES = 60  # of progress, where there is no terminal
_SECONDS_BETWEEN_LOOKS = 0.1
_TIDYING = 10  # seconds between looks at checkpoints, on a filesystem that may be shared
_JOBS_OWN = (RunError, UserError, OSError)  # what ends a job, and not the queue


class Running:
    """A job that is being run: one of its commands at a time, their output appended to output.txt.

    The commands are nicer than this process by `nice`, hold the `locks` while they live and, on Linux, die with it. Of
    several `gpus` they see the one of the job's `slot` alone (spacte.jobs.gpus).
    """

    def __init__(self, job: Job, threads: int, nice: int, locks: list, slot: int = 0, gpus: Sequence[str] = ()):
        check_unchanged(job)
        self.job, self.nice, self.locks, self.slot, self.started = job, nice, locks, slot, time.monotonic()
        gpu = gpu_of(job, slot, gpus)
        self.gpu_environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | self.gpu_environment
        self.output = job.folder / "output.txt"
        self.tidied = self.started
        self.is_fresh = not self.output.exists()  # otherwise its time says nothing of other jobs'
        self.steps = [train_command] * (job.train is not None) + [certify_command] * (job.certify is not None)
        self.command: list[str] = []  # that runs, or ran last
        self.child: subprocess.Popen | None = None
        write_record(job, finished=False)

    def advance(self) -> bool:
        """Start the next command if none is running; returns whether the job has ended well. RunError if not."""
        if self.child is not None:
            code = self.child.poll()
            if code is None:
                if time.monotonic() - self.tidied > _TIDYING:
                    remove_old_checkpoints(self.job, keep=2)
                    self.tidied = time.monotonic()
                return False
            if code:
                how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                raise RunError(f"{self.command[1]} ended with {how}: {last_line(self.output)}")
            remove_old_checkpoints(self.job, keep=1)
        if not self.steps:
            write_record(self.job, finished=True, seconds=self.seconds() if self.is_fresh else None)
            return True
        self.command = self.steps.pop(0)(self.job)
        with open(self.output, "a", errors="surrogateescape") as output:  # names of files can be any bytes
            own = [f"{name}={value}" for name, value in self.gpu_environment.items()]
            output.write(f"$ cd {shlex.quote(str(self.job.scripts))}; {shlex.join(own + self.command)}\n")
            output.flush()
            self.child = subprocess.Popen(
                self.command,
                cwd=self.job.scripts,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=[lock.fileno() for lock in self.locks],
                preexec_fn=lambda: set_priority_and_end(self.nice),
            )
        return False

    def end(self) -> None:
        """End its command, and all that this started, now: what is on disk is whole at any moment."""
        if self.child is not None and self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGTERM)
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.child.pid, signal.SIGKILL)
                self.child.wait()

    def seconds(self) -> float:
        """Seconds since the job started."""
        return time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """What the running command said last; None where it has said nothing, or its folder is gone."""
        try:
            said = re.search(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d) left$", last_line(self.output))
        except OSError:
            said = None
        if said is None:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in said.groups())
        return timedelta(days, seconds, minutes=minutes, hours=hours).total_seconds()


class Queue:
    """Every job that is not finished, run in their order, `processes` at a time; one that needs others waits for them.

    `start(job, slot)` starts one; the slots of those that run are different numbers below `processes`.
    """

    def __init__(self, jobs: list[Job], processes: int, start: Callable[[Job, int], Running]):
        self.jobs, self.processes, self.start = jobs, processes, start
        self.done = {job.name for job in jobs if is_finished(job)}
        self.took = {job.name: read_record(job).get("seconds") for job in jobs}
        self.failed: set[str] = set()
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.running: list[Running] = []
        self.said = time.monotonic()
        self.bar = tqdm(bar_format="{desc}", disable=None, dynamic_ncols=True, leave=False)

    def run_all(self) -> None:
        """Returns when no job is left that can be run; running jobs end where this is interrupted."""
        self._say(f"{len(self.jobs)} job{'s' * (len(self.jobs) > 1)}, {len(self.done)} of them finished")
        try:
            while self.waiting or self.running:
                self._start_jobs()
                for one in list(self.running):
                    self._look_at(one)
                self._show()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            for one in self.running:
                one.end()
            self.bar.close()
        self._say(f"{len(self.done)} of {len(self.jobs)} jobs finished, {len(self.failed)} failed")

    def _start_jobs(self) -> None:
        unended = {job.name for job in (*self.waiting, *(one.job for one in self.running))}
        ready = [job for job in self.waiting if not any(needed.name in unended for needed in job.needs)]
        for job in ready[: self.processes - len(self.running)]:
            self.waiting.remove(job)
            lost = [needed.name for needed in job.needs if needed.name in self.failed]
            try:
                make_folder(job.folder)
                (job.folder / "failed.txt").unlink(missing_ok=True)
                if lost:
                    raise RunError(f"it needs {lost[0]}, which has failed")
                taken = {one.slot for one in self.running}
                slot = next(slot for slot in range(self.processes) if slot not in taken)
                self.running.append(self.start(job, slot))
            except _JOBS_OWN as error:
                self._fail(job, str(error))
            else:
                self._say(f"started  {job.name}")

    def _look_at(self, one: Running) -> None:
        try:
            if not one.advance():
                return
        except _JOBS_OWN as error:
            one.end()
            self._fail(one.job, str(error))
        else:
            self.done.add(one.job.name)
            self.took[one.job.name] = read_record(one.job).get("seconds")
            self._say(f"finished {one.job.name} in {timedelta(seconds=round(one.seconds()))}")
        self.running.remove(one)

    def _fail(self, job: Job, reason: str) -> None:
        self.failed.add(job.name)
        self._say(f"failed   {job.name}: {reason}")
        with suppress(UserError):  # a folder that cannot be written may be the reason
            replace_file(job.folder / "failed.txt", reason + "\n")

    def _say(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()

    def _show(self) -> None:
        """Say how things stand, if it is time to: live on a terminal, otherwise in one line per minute."""
        if time.monotonic() - self.said < (_SECONDS_BETWEEN_LINES if self.bar.disable else 1):
            return
        self.said = time.monotonic()
        text = (
            f"{len(self.done)} of {len(self.jobs)} jobs done, {len(self.running)} running, {len(self.waiting)} waiting"
        )
        text += f", {len(self.failed)} failed" * bool(self.failed) + self._time_left()
        if self.bar.disable:
            self._say(text)
        else:
            self.bar.set_description_str(text)

    def _time_left(self) -> str:
        """A job takes what others of its run took, or else the mean of all runs that are known."""
        seconds: dict[str, list[float]] = {}
        for job in self.jobs:
            took = self.took[job.name]
            if isinstance(took, int | float):
                seconds.setdefault(job.run_name, []).append(took)
        left = [one.seconds_left() for one in self.running]
        for one, rest in zip(self.running, left, strict=True):
            if rest is not None:
                seconds.setdefault(one.job.run_name, [one.seconds() + rest])
        if not seconds:
            return ""
        known = {run: statistics.mean(times) for run, times in seconds.items()}
        mean = statistics.mean(known.values())
        total = sum(known.get(job.run_name, mean) for job in self.waiting)
        for one, rest in zip(self.running, left, strict=True):
            total += max(known.get(one.job.run_name, mean) - one.seconds(), rest or 0.0, 0.0)
        return f", about {timedelta(seconds=round(total / self.processes))} left"
