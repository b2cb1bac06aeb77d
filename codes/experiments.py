"""Run a file of experiments, on this machine or through SLURM: train, certify, and resume after any interruption.

python codes/experiments.py codes/queues/digits.toml --work ~/digits --processes 2
python codes/experiments.py codes/queues/digits.toml --work ~/digits --list
python codes/experiments.py codes/queues/digits.toml --work ~/digits --slurm='--time=240 --gpus=1'
python codes/experiments.py codes/queues/digits.toml --work ~/digits --commands > jobs.txt
python codes/experiments.py codes/queues/digits.toml --work ~/digits --collect logs_certification/mine

A job is a run with one seed: train.py, then certify_mhead.py. Its checkpoints (the newest two while it trains, the last
one later), logs and output are in <work>/<defence>/<label>/seed-<k>/; an ensemble's are in <work>/<defence>/<label>/.
Line n of --commands runs the n-th job alone; where that needs others, they stand above it. --slurm submits the
jobs instead: each goes back into SLURM's queue before its time is over, and resumes. A queue file:

    [defaults]                     # of every run; a run's own flags come after these, and of two the later one counts
    seeds = [1, 2, 3]
    train = "--dataset digits --arch R8 --noise_sd 0.5 --save_freq 5"
    certify = "--N 1000"           # false: training only
    [[run]]
    label = "five-heads"           # the name of its folder
    defence = "0Gaussian"
    train = "--num_heads 5"
    [[run]]
    label = "one-head"
    defence = "0Gaussian"
    train = "--num_heads 1"
    seeds = [1, 2, 3, 4, 5]        # in place of the defaults'
    certify = "--sequential"       # after the defaults' flags
    [[run]]
    label = "learns-votes"
    defence = "5CATRS"             # its flags may name other jobs' files: WORK/ stands for the --work folder
    after = "one-head"             # starts once this run, or each run of a list, has finished
    train = "--votes_dir WORK/votes --pretrained_model WORK/0Gaussian/one-head/seed-1/save/<...>/epoch150.pth"
    [[ensemble]]
    label = "five-networks"
    of = "one-head"                # that run's networks of all seeds, certified as one classifier
    [[ensemble]]
    label = "two-networks"
    of = "one-head"
    seeds = [[1, 2], [3, 4]]       # two such classifiers, in folders seeds-1-2 and seeds-3-4; lists that share no seed
                                   # can be averaged by report.py --over_seeds
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import gzip
import json
import re
import shlex
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from spacte import cli
from spacte.files import lock, make_folder, replace_file
from spacte.jobs import slurm
from spacte.jobs.flags import check_flags
from spacte.jobs.gpus import visible_gpus
from spacte.jobs.job import Job, is_finished, state
from spacte.jobs.queue import Queue, Running
from spacte.jobs.queue_file import read_queue
from spacte.utils import TakenError, UserError

CODES = Path(__file__).resolve().parent


def _run_queue(jobs: list[Job], work: Path, args: Namespace) -> None:
    """As the only queue in the work folder; exit code 1 where jobs have failed."""
    slurm.check_none(_known(slurm.submitted, work))
    taken = f"another queue, or a command that one started, is still at work in '{work}'"
    processes = args.processes or 1
    gpus = visible_gpus() if processes > 1 else []
    with lock(work / "lock", taken) as held:
        _run(jobs, processes, lambda job, slot: Running(job, args.threads, 19, [held], slot, gpus))


def _run_job(job: Job, work: Path, args: Namespace) -> None:
    """As one of several processes that work on other jobs in the folder; exit code 1 where it has failed."""
    for needed in job.needs:
        if not is_finished(needed):
            raise TakenError(f"{job.name} needs {needed.name}, which is not finished")
    with (
        slurm.requeued(job) if args.requeue else nullcontext(),
        lock(work / "lock", f"a queue is at work in '{work}'", shared=True) as shared,
        lock(make_folder(job.folder) / "lock", f"another process is at work on {job.name}") as own,
    ):
        _run([job], 1, lambda job, slot: Running(job, args.threads, nice=0, locks=[shared, own]))


def _run(jobs: list[Job], processes: int, start: Callable[[Job, int], Running]) -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        queue = Queue(jobs, processes, start)
        queue.run_all()
    finally:
        signal.signal(signal.SIGTERM, before)
    if queue.failed:
        sys.exit(1)


def _command(work: Path, args: Namespace) -> list[str]:
    """What runs the queue."""
    script, queue = Path(__file__).resolve(), args.queue.resolve()
    return [sys.executable, *map(str, (script, queue, "--work", work, "--threads", args.threads))]


def _known(query: Callable[[Path], dict], work: Path) -> dict:
    """What slurm.submitted or slurm.last_output says of the folder; nothing, with a warning, where it cannot tell."""
    try:
        return query(work)
    except UserError as error:
        warnings.warn(f"SLURM's job states are unknown: {error}", stacklevel=1)
        return {}


def _list(jobs: list[Job], work: Path) -> None:
    """How each job stands."""
    there, outputs = _known(slurm.submitted, work), _known(slurm.last_output, work)
    width = max(len(job.name) for job in jobs)
    for job in jobs:
        how = state(job)
        if job.name in there:
            number, its_state = there[job.name]
            more = {"waiting": "", "begun": ""}.get(how, f", {how.removeprefix('begun, ')}")
            how = f"{its_state} in SLURM as {number}{more}"
        elif how != "finished" and job.name in outputs:
            how += f"; was {outputs[job.name]}"
        print(f"{job.name:{width}}  {how}")


_LOGS = (".log", ".json", ".jsonl", ".jsonl.gz")


def _without(path: Path, name: bytes, content: bytes) -> bytes:
    """The content of a JSON file, with the name in place of the path: where a text or a flag's value begins with it."""
    in_json = json.dumps(str(path))[1:-1].encode()
    return re.sub(rb'(?<=["=])' + re.escape(in_json) + rb'(?=[/"])', name, content)


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
                content = _without(job.codes, b"CODES", _without(job.work, b"WORK", content))
            if not target.exists() or target.read_bytes() != content:
                make_folder(target.parent)
                replace_file(target, content)
                copied += 1
    print(f"{len(finished)} of {len(jobs)} jobs are finished: {copied} files copied to '{folder}'")


def _parse() -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("queue", type=Path, metavar="QUEUE.toml", help="the file of runs")
    add("--work", type=Path, required=True, metavar="DIR", help="checkpoints and logs go there; not in the checkout")
    dealt = (
        "jobs at a time (default: 1; of a SLURM array: no limit); with several GPUs each job gets one in turn, unless "
        "its --device is cuda:<index>"
    )
    add("--processes", type=cli.positive_int, help=dealt)
    add("--threads", type=cli.positive_int, default=1, help="CPU threads per job")
    order = (
        "seeds: each run's first seed, then each run's second, ..., so that a whole table is there early; runs: by run"
    )
    add("--order", choices=("seeds", "runs"), default="seeds", help=order)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="only say how each job stands")
    instead.add_argument("--commands", action="store_true", help="only print each job as a command that runs it")
    instead.add_argument("--job", metavar="NAME", help="only this job, as --list names it")
    by_slurm = "hand the jobs that are not finished to SLURM, with these flags of sbatch: --slurm='--time=240 --gpus=1'"
    instead.add_argument("--slurm", metavar="FLAGS", help=by_slurm)
    instead.add_argument("--collect", type=Path, metavar="FOLDER", help="only copy the finished jobs' logs there")
    add("--requeue", action="store_true", help="with --job: at USR1 the job of SLURM goes back into SLURM's queue")
    args = parser.parse_args()
    if args.requeue and args.job is None:
        parser.error("--requeue needs --job")
    return args


def _resolved(folder: Path) -> Path:
    """The folder as an absolute path. UserError if that leads nowhere."""
    try:
        return folder.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # no such user, links in a circle, a working directory that is gone
        raise UserError(f"'{folder}' leads nowhere: {getattr(error, 'strerror', None) or error}") from error


def _main() -> None:
    args = _parse()
    work = _resolved(args.work)
    if work.is_relative_to(CODES.parent):
        raise UserError(f"--work '{args.work}' lies in the checkout '{CODES.parent}': give a folder outside it")
    jobs = read_queue(args.queue, CODES, work, args.order)
    if not (args.list or args.collect or args.job):  # then jobs begin, here or elsewhere
        check_flags(jobs)
    if args.list:
        _list(jobs, work)
    elif args.commands:
        for job in jobs:
            print(shlex.join([*_command(work, args), "--job", job.name]))
    elif args.slurm is not None:
        command = [*_command(make_folder(work), args), "--requeue", "--job"]
        slurm.submit(jobs, command, work, args.queue.stem, args.slurm, args.processes)
    elif args.collect:
        _collect(jobs, _resolved(args.collect))
    elif args.job is not None:
        names = {job.name: job for job in jobs}
        if args.job not in names:
            raise UserError(f"--job '{args.job}' must be one of {', '.join(names)}")
        _run_job(names[args.job], make_folder(work), args)
    else:
        _run_queue(jobs, make_folder(work), args)


if __name__ == "__main__":
    cli.run(_main)
