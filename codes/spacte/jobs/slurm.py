"""A queue's jobs in SLURM: arrays of them, which go back into its queue before their time is over, and resume.

jobs -> arrays, each after those that it needs -> sbatch -> experiments.py --job
"""

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spacte.files import make_folder, replace_file
from spacte.jobs.job import Job, is_finished, last_line, left_on_disk
from spacte.utils import RunError, TakenError, UserError, listed

_SET_BY_THE_QUEUE = (
    "--array", "--dependency", "--output", "--no-requeue", "--parsable", "--wait", "--wrap", "-a", "-d", "-o", "-W",
)  # fmt: skip
_LARGEST_ARRAY = 1000  # what SLURM takes unless it is told otherwise
_SECONDS_TO_END = 120  # before the time limit: a job ends within a minute, and SLURM may send the signal a minute late


def submit(jobs: list[Job], command: list[str], work: Path, name: str, flags: str, most: int | None) -> None:
    """Hand the jobs that are not finished to sbatch; `command` and a job's name run it, `flags` are sbatch's own.

    `most` jobs of an array run at a time (None: as many as SLURM lets).
    Jobs that need the same others are one array, which begins once these have ended, well or not: each job looks
    itself whether what it needs is there. Raises TakenError if some are with SLURM already, and UserError if
    sbatch refuses; `submitted` knows those that it took before.
    """
    own = _sbatch_flags(flags)
    check_none(submitted(work, jobs))
    numbers = _read_numbers(work)
    if all(map(is_finished, jobs)):
        print(f"all {len(jobs)} jobs are finished")
        return
    make_folder(work / "slurm")  # a job that begins at once writes there
    output = f"{work / 'slurm'}".replace("%", "%%") + "/%A_%a.txt"
    own = [f"--job-name={name}", f"--output={output}", "--open-mode=append", "--requeue", *own]
    for needs, array in _arrays(jobs):
        after = [f"--dependency=afterany:{':'.join(numbers[needed] for needed in needs)}"] if needs else []
        signal_to = f"--signal=B:USR1@{_SECONDS_TO_END}"  # B: to the shell alone, since NCCL catches it
        tasks = f"--array=0-{len(array) - 1}" + f"%{most}" * (most is not None)
        number = _sbatch([tasks, *after, signal_to, *own], _script(command, array))
        numbers |= {job.name: f"{number}_{task}" for task, job in enumerate(array)}
        replace_file(_numbers_file(work), json.dumps(numbers, indent=1) + "\n")
        print(
            f"submitted {number}: {len(array)} job{'s' * (len(array) > 1)}"
            + f", after {listed(needs, 2)}" * bool(needs)
        )


def _arrays(jobs: list[Job]) -> Iterator[tuple[tuple[str, ...], list[Job]]]:
    """The jobs that are not finished, together where they need the same ones of these; those come before."""
    unfinished = {job.name for job in jobs if not is_finished(job)}
    alike: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        if job.name in unfinished:
            needs = tuple(needed.name for needed in job.needs if needed.name in unfinished)
            alike.setdefault(needs, []).append(job)
    for needs, of_these in alike.items():
        for start in range(0, len(of_these), _LARGEST_ARRAY):
            yield needs, of_these[start : start + _LARGEST_ARRAY]


def _sbatch_flags(text: str) -> list[str]:
    """UserError if they are no flags, or such as the queue sets."""
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--slurm '{text}': {error}") from error
    for flag in flags:
        if not flag.startswith("-"):  # sbatch might take it for the script
            raise UserError(f"--slurm '{text}': '{flag}' is no flag; write --flag=value")
        name = flag.split("=")[0]
        short = not flag.startswith("--") and flag[:2] in _SET_BY_THE_QUEUE
        if short or (len(name) > 2 and any(one.startswith(name) for one in _SET_BY_THE_QUEUE)):  # sbatch abbreviates
            raise UserError(f"--slurm must not hold {flag}: the queue sets {', '.join(_SET_BY_THE_QUEUE)}")
    return flags


def _script(command: list[str], jobs: list[Job]) -> str:
    """The batch script: Python replaces the shell (exec), so that it gets the signal that is sent to the shell."""
    names = " ".join(shlex.quote(job.name) for job in jobs)
    return f'#!/bin/bash\njobs=({names})\nexec {shlex.join(command)} "${{jobs[$SLURM_ARRAY_TASK_ID]}}"\n'


def _sbatch(flags: list[str], script: str) -> str:
    """The array's number."""
    said = _run(["sbatch", "--parsable", *flags], UserError, script)
    number = said.strip().split(";")[0]  # then the cluster's name, where there are several
    if not number.isdecimal():
        raise UserError(f"sbatch has submitted nothing; it says: {listed(said.split(), 8)}")
    return number


def _run(command: list[str], failure: type[UserError] = TakenError, stdin: str = "") -> str:
    """What one of SLURM's commands says. `failure` if it fails, usually because SLURM is not answering."""
    try:
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise TakenError(f"{command[0]} did not answer within {error.timeout:g} s") from error
    except OSError as error:
        raise UserError(f"SLURM's command {command[0]} cannot be run here: {error.strerror}") from error
    if result.returncode:
        lines = [re.sub(r"^\w+: (error: )?", "", line) for line in result.stderr.splitlines()]
        raise failure(f"{command[0]}: {'; '.join(lines) or f'exit code {result.returncode}'}")
    return result.stdout


# --- what is with SLURM ---


def check_none(there: dict[str, tuple[str, str]]) -> None:
    """TakenError if some jobs are with SLURM."""
    if there:
        arrays = sorted({number.split("_")[0] for number, _ in there.values()}, key=int)
        raise TakenError(f"jobs queued or running in SLURM: {len(there)}; wait, or run: scancel {' '.join(arrays)}")


def submitted(work: Path, jobs: list[Job] | None = None) -> dict[str, tuple[str, str]]:
    """Those of the jobs, or of all that the folder has seen, that wait or run in SLURM: their numbers and states.

    UserError if SLURM cannot be asked.
    """
    names, numbers = None if jobs is None else {job.name for job in jobs}, _read_numbers(work)
    numbers = {name: number for name, number in numbers.items() if names is None or name in names}
    if not numbers:
        return {}
    lines = _run(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]).splitlines()
    states = dict(line.split() for line in lines)
    return {name: (number, states[number].lower()) for name, number in numbers.items() if number in states}


def last_output(work: Path) -> dict[str, str]:
    """Of each job that the folder has seen in SLURM: its number, and the last line that it left in SLURM's output."""
    words = {}
    for name, number in _read_numbers(work).items():
        try:
            words[name] = f"{number} in SLURM: {last_line(work / 'slurm' / f'{number}.txt')}"
        except OSError:
            words[name] = f"{number} in SLURM, without output"
    return words


def _read_numbers(work: Path) -> dict[str, str]:
    """The number, array_task, with which each job was last submitted."""
    try:
        numbers = json.loads(_numbers_file(work).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"'{_numbers_file(work)}' cannot be read: {error}") from error
    if not isinstance(numbers, dict) or not all(isinstance(number, str) for number in numbers.values()):
        raise UserError(f"'{_numbers_file(work)}' does not hold the numbers of jobs")
    return numbers


def _numbers_file(work: Path) -> Path:
    return work / "slurm" / "submitted.json"


# --- within a job of SLURM's ---


class _TimeIsOver(BaseException):
    """SLURM has sent USR1."""


@contextmanager
def requeued(job: Job) -> Iterator[None]:
    """At USR1 the block ends, and the SLURM job is requeued. The same happens if its files are locked, perhaps by an
    earlier run that is still alive on a node that SLURM has lost.

    RunError if at USR1 nothing new of the job is on disk since the block began: it would be requeued for ever.
    UserError if this is no SLURM job.
    """
    number = _own_number()
    if number is None:
        raise UserError("--requeue is for jobs of SLURM, and this is none")

    def stop(*_: object) -> None:
        raise _TimeIsOver

    there, before = left_on_disk(job), signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    except _TimeIsOver:
        if left_on_disk(job).items() <= there.items():
            raise RunError(
                f"{job.name} left no checkpoint and no row within its time limit: give a longer --time, or a smaller "
                "--save_freq"
            ) from None
        _requeue(job, number)
    except TakenError as error:
        _requeue(job, number, f": {error}")
    finally:
        signal.signal(signal.SIGUSR1, before)


def _requeue(job: Job, number: str, why: str = "") -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    print(f"{job.name} goes back into SLURM's queue as {number}{why}", flush=True)
    _run(["scontrol", "requeue", number])


def _own_number() -> str | None:
    """What SLURM calls this job: of an array's task not SLURM_JOB_ID, which the array's last task shares with it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
