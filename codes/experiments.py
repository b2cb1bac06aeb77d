"""Work off a file of runs on this machine: train, certify, and go on after any interruption.

python codes/experiments.py codes/queues/digits.toml --work ~/digits --processes 2
python codes/experiments.py codes/queues/digits.toml --work ~/digits --list
python codes/experiments.py codes/queues/digits.toml --work ~/digits --commands > jobs.txt
python codes/experiments.py codes/queues/digits.toml --work ~/digits --collect logs_certification/mine

A job is a run with one seed: train.py, then certify_mhead.py. Its checkpoints (the newest two while it trains, the last
one later), logs and output are in <work>/<defence>/<label>/seed-<k>/; an ensemble's are in <work>/<defence>/<label>/.
Line n of --commands works off the n-th job alone, for an array job of a cluster; the ensembles, which come last, need
the others' checkpoints. A queue file:

    [defaults]                     # of every run; a run's own flags come after these, and of two the later one counts
    seeds = [1, 2, 3]
    train = "--dataset digits --arch R8 --noise_sd 0.5 --save_freq 5"
    certify = "--N 1000"
    [[run]]
    label = "five-heads"           # the name of its folder
    defence = "0Gaussian"
    train = "--num_heads 5"
    [[run]]
    label = "one-head"
    defence = "0Gaussian"
    train = "--num_heads 1"
    seeds = [1, 2, 3, 4, 5]        # in place of the defaults'
    certify = "--sequential"       # after the defaults' flags; false: training only
    [[run]]
    label = "learns-votes"
    defence = "5CATRS"             # WORK/ is the --work folder: what other jobs left there
    train = "--votes_dir WORK/votes --pretrained_model WORK/0Gaussian/one-head/seed-1/save/<...>/epoch150.pth"
    [[ensemble]]
    label = "five-networks"
    of = "one-head"                # that run's networks of all seeds, certified as one classifier
"""

import gzip
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from spacte import cli
from spacte.jobs import (
    Job,
    check_unchanged,
    commands,
    is_finished,
    read_queue,
    record,
    recorded,
    remove_old_checkpoints,
    state,
)
from spacte.processes import set_priority_and_end
from spacte.utils import RunError, UserError, lock, make_folder, replace_file

CODES = Path(__file__).resolve().parent
_SECONDS_BETWEEN_LINES = 60  # of progress, where there is no terminal
_SECONDS_BETWEEN_LOOKS = 0.1


class Running:
    """A job that is being run: one of its commands at a time, their output appended to output.txt.

    The commands are nicer than this process by `nice`, hold the `locks` while they live and, on Linux, die with it.
    """

    def __init__(self, job: Job, threads: int, nice: int, locks: list):
        check_unchanged(job)
        self.job, self.nice, self.locks, self.started = job, nice, locks, time.monotonic()
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.output = job.folder / "output.txt"
        self.anew = not self.output.exists()  # otherwise its time says nothing of other jobs'
        self.steps = commands(job)
        self.child: subprocess.Popen | None = None
        record(job, finished=False)

    def advance(self) -> bool:
        """Start the next command if none is running; returns whether the job has ended well. RunError where not."""
        if self.child is not None:
            code = self.child.poll()
            if code is None:
                remove_old_checkpoints(self.job, keep=2)
                return False
            if code:
                how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                raise RunError(f"{self.child.args[1]} ended with {how}: {self.last_line()}")
        command = next(self.steps, None)
        if command is None:
            record(self.job, finished=True, seconds=self.seconds() if self.anew else None)
            return True
        with open(self.output, "a") as output:
            output.write(f"$ cd {shlex.quote(str(self.job.scripts))}; {shlex.join(command)}\n")
            output.flush()
            self.child = subprocess.Popen(
                command,
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
        """Since its start."""
        return time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """What the running command said last; None where it has said nothing."""
        said = re.search(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d) left$", self.last_line())
        if said is None:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in said.groups())
        return timedelta(days, seconds, minutes=minutes, hours=hours).total_seconds()

    def last_line(self) -> str:
        """The last line of the output that holds something."""
        with open(self.output, "rb") as file:
            file.seek(max(0, self.output.stat().st_size - 4000))
            lines = file.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


_JOBS_OWN = (RunError, UserError, OSError)  # what ends a job, and not the queue


class Queue:
    """Every job that is not finished, run in their order, `processes` at a time; an ensemble waits for its members."""

    def __init__(self, jobs: list[Job], processes: int, start: Callable[[Job], Running]):
        self.jobs, self.processes, self.start = jobs, processes, start
        self.done = {job.name for job in jobs if is_finished(job)}
        self.failed: set[str] = set()
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.running: list[Running] = []
        self.said = time.monotonic()
        self.bar = tqdm(bar_format="{desc}", disable=None, dynamic_ncols=True, leave=False)

    def work_off(self) -> None:
        """Returns when no job is left that can be run; what is running ends where this is interrupted."""
        self._say(f"{len(self.jobs)} jobs, {len(self.done)} of them finished")
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
        ready = [job for job in self.waiting if not any(member.name in unended for member in job.members)]
        for job in ready[: self.processes - len(self.running)]:
            self.waiting.remove(job)
            lost = [member.name for member in job.members if member.name in self.failed]
            try:
                make_folder(job.folder)
                (job.folder / "failed.txt").unlink(missing_ok=True)
                if lost:
                    raise RunError(f"it needs {lost[0]}, which has failed")
                self.running.append(self.start(job))
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
            self._say(f"finished {one.job.name} in {timedelta(seconds=round(one.seconds()))}")
        self.running.remove(one)

    def _fail(self, job: Job, reason: str) -> None:
        self.failed.add(job.name)
        self._say(f"failed   {job.name}: {reason}")
        with suppress(UserError):  # a folder that cannot be written may be the reason
            replace_file(job.folder / "failed.txt", lambda temporary: temporary.write_text(reason + "\n"))

    def _say(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()

    def _show(self) -> None:
        """Say how things stand, if it is time to: live on a terminal, otherwise in a line a minute."""
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
            took = recorded(job).get("seconds")
            if took is not None:
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
        return f", about {timedelta(seconds=round(total / self.processes))} to go"


def _work_off(jobs: list[Job], work: Path, args: Namespace) -> None:
    """As the only queue in the work folder; exit code 1 where jobs have failed."""
    taken = f"another queue, or a command that one started, is still at work in '{work}'"
    with lock(work / "lock", taken) as held:
        _run(jobs, args.processes, lambda job: Running(job, args.threads, nice=19, locks=[held]))


def _work_off_one(job: Job, work: Path, args: Namespace) -> None:
    """As one of several processes that work on other jobs in the folder; exit code 1 where it has failed."""
    for member in job.members:
        if not is_finished(member):
            raise UserError(f"{job.name} needs {member.name}, which is not finished")
    with (
        lock(work / "lock", f"a queue is at work in '{work}'", shared=True) as shared,
        lock(make_folder(job.folder) / "lock", f"another process is at work on {job.name}") as own,
    ):
        _run([job], 1, lambda job: Running(job, args.threads, nice=0, locks=[shared, own]))


def _run(jobs: list[Job], processes: int, start: Callable[[Job], Running]) -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        queue = Queue(jobs, processes, start)
        queue.work_off()
    finally:
        signal.signal(signal.SIGTERM, before)
    if queue.failed:
        sys.exit(1)


def _print_commands(jobs: list[Job], work: Path, args: Namespace) -> None:
    script, queue = Path(__file__).resolve(), args.queue.resolve()
    for job in jobs:
        command = [sys.executable, script, queue, "--work", work, "--threads", args.threads, "--job", job.name]
        print(shlex.join(map(str, command)))


_LOGS = (".log", ".json", ".jsonl", ".jsonl.gz")


def _collect(jobs: list[Job], folder: Path) -> None:
    """Copy the finished jobs' logs to <folder>/<defence>/<label>/..., those that are not there already.

    A configuration's paths of this machine become WORK and CODES: results are for others to read. Vote counts are
    compressed, unless they lie there as they are.
    """
    finished, copied = [job for job in jobs if is_finished(job)], 0
    for job in finished:
        logs = job.folder / "logs"
        for path in sorted(path for path in logs.rglob("*") if path.name.endswith(_LOGS)):
            target = folder / job.name / path.relative_to(logs)
            content = path.read_bytes()
            if path.suffix == ".jsonl" and not target.exists():
                target, content = target.with_name(f"{target.name}.gz"), gzip.compress(content, mtime=0)
            if path.suffix == ".json":
                content = content.replace(bytes(job.work), b"WORK").replace(bytes(job.codes), b"CODES")
            if not target.exists() or target.read_bytes() != content:
                make_folder(target.parent)
                replace_file(target, lambda temporary, content=content: temporary.write_bytes(content))
                copied += 1
    print(f"{len(finished)} of {len(jobs)} jobs are finished: {copied} files copied to '{folder}'")


def _parse() -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("queue", type=Path, metavar="QUEUE.toml", help="the file of runs")
    add("--work", type=Path, required=True, metavar="DIR", help="checkpoints and logs go there; not in the checkout")
    add("--processes", type=cli.positive_int, default=1, help="jobs at a time")
    add("--threads", type=cli.positive_int, default=1, help="CPU threads a job")
    order = (
        "seeds: each run's first seed, then each run's second, ..., so that a whole table is there early; runs: by run"
    )
    add("--order", choices=("seeds", "runs"), default="seeds", help=order)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="only say how each job stands")
    instead.add_argument("--commands", action="store_true", help="only print each job as a command that works it off")
    instead.add_argument("--job", metavar="NAME", help="only this job, as --list names it")
    instead.add_argument("--collect", type=Path, metavar="FOLDER", help="only copy the finished jobs' logs there")
    return parser.parse_args()


def _main() -> None:
    args = _parse()
    work = args.work.expanduser().resolve()
    if work.is_relative_to(CODES.parent):
        raise UserError(f"--work '{args.work}' lies in the checkout '{CODES.parent}': give a folder outside it")
    jobs = read_queue(args.queue, CODES, work, args.order)
    if args.list:
        width = max(len(job.name) for job in jobs)
        for job in jobs:
            print(f"{job.name:{width}}  {state(job)}")
    elif args.commands:
        _print_commands(jobs, work, args)
    elif args.collect:
        _collect(jobs, args.collect)
    elif args.job:
        names = {job.name: job for job in jobs}
        if args.job not in names:
            raise UserError(f"--job '{args.job}' must be one of {', '.join(names)}")
        _work_off_one(names[args.job], make_folder(work), args)
    else:
        _work_off(jobs, make_folder(work), args)


if __name__ == "__main__":
    cli.run(_main)
