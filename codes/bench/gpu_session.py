"""Use a GPU that is there for a limited time: its tests, its speed, two training runs, their certificates and files.

    python codes/bench/gpu_session.py --dataset CIFAR10 --data_dir D --output O --minutes 15
    python codes/bench/gpu_session.py --dataset digits --arch R8 --epochs 4 --N 500 --output O --minutes 9 --tiny \\
        --device cpu

The second one tries it out without a GPU. The steps come in this order, and which are finished stands in O. Started
again with the same O, the session resumes: finished steps are skipped, measured speeds are kept, training resumes
after its last checkpoint, certification after its last image. It may be killed at any moment.

    tests                 tests/test_gpu.py, by up to 12 processes where pytest-xdist is installed: a tenth of the time,
                          and at least 90 s, at most
    speed                 bench_speeds.py: all speeds in one process, in --speed_seconds
    train-5-heads         train.py of --defence with --num_heads
    release-5-heads       the checkpoint without its optimiser, in parts below 16 MiB
    train-1-head, release-1-head    the same with one head: what the heads are compared with
    certify-5-heads, certify-1-head    certify_mhead.py on every --skip-th test image, in the precision of training

Both networks are trained for the same number of epochs, as many as the time allows and at most --epochs. It follows
from the speeds, and is written down when training begins; where the speed of a network like this one was not measured,
a run's first two epochs are trained before for their time. Steps are compiled (train.py --compile) where that pays
within these epochs. The learning rate drops after each third of them, as the paper's does.

A step that the time left cannot hold is not begun and is named, and one that is under way when its time is over is
ended: training loses no more than an epoch or half a minute, certification a few images. A step that fails is
reported, the next one is run, and the exit code is 1.

    O/summary.md                         after each step: machine, seconds, speeds, ACR and certified accuracy
    O/session.json                       settings, steps, the number of epochs
    O/output/<step>.txt                  what each step has printed
    O/bench/speeds.json                  speeds
    O/logs/                              logs of training and certification, with every vote
    O/release/                           the checkpoints' parts, their SHA-256, and in join.sh what joins them
    O/work/                              checkpoints: what a session needs to resume
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import contextlib
import functools
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_parts import cut
from gpu_steps import OutOfTimeError, Session, Step, say

from gpu_plan import Pace, certification_seconds, epochs_within, paces_of, read_speeds, rows_of
from gpu_summary import page
from spacte import cli
from spacte.certify.certify import CertifySettings
from spacte.data.sources import open_split
from spacte.files import lock, make_folder, replace_file
from spacte.jobs.job import (
    Job,
    certify_command,
    check_unchanged,
    last_checkpoint,
    remove_old_checkpoints,
    train_command,
    write_record,
)
from spacte.precision import PRECISIONS
from spacte.train.release import release
from spacte.train.settings import Recipe
from spacte.utils import RunError, UserError

_CODES = Path(__file__).resolve().parents[1]
# what a resumed session may change
_FREE = ("data_dir", "device", "output", "minutes", "speed_seconds", "training_share")
_CPU = torch.device("cpu")
_PAPERS_PACE = {("0Gaussian", 0.5): 0.8, ("0Gaussian", 1.0): 0.8}  # --lbdlast, where it is not the defence's default
_PROCESSES = 12  # of the tests, which are bound by their start
_START = 30  # seconds that bench_speeds.py may take beyond its own: its start, a last row slower than those before
_BETWEEN_CHECKPOINTS = 20  # seconds
_PART = {False: 15 * 2**20, True: 2**17}  # bytes of a part of a released checkpoint; True: --tiny


def _flags() -> Namespace:
    parser = cli.Parser(__doc__)
    add, recipe = parser.add_argument, cli.defaults_of(Recipe)
    add("--output", type=Path, required=True, metavar="O", help="where everything goes")
    add("--minutes", type=cli.positive_float, required=True, help="how long the GPU is there, from now on")
    add("--speed_seconds", type=cli.positive_float, help="of these, at most for speed (default: a ninth)")
    share = "of the time left after tests and speed, what training may plan for at least; the rest is certification's"
    add("--training_share", type=cli.open_probability, default=0.6, help=share)
    add("--dataset", default=recipe["dataset"], help="what is trained on and certified")
    add("--data_dir", type=Path, default=Path("data"), help="where its files are")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--tiny", action="store_true", help="speed of tiny networks: to try a session out on a CPU")
    add("--defence", default="0Gaussian", help="the folder of the base defence")
    add("--arch", default=recipe["arch"], help="of the networks that are trained")
    add("--num_heads", type=cli.positive_int, default=recipe["num_heads"], help="L, beside 1")
    add("--noise_sd", type=cli.positive_float, default=0.5, help="sigma, in units of [0, 1]")
    add("--lbdlast", type=cli.pace, help="lambda in the last epoch (default: the paper's)")
    add("--precision", choices=PRECISIONS, default="bf16", help="of training and certification")
    add("--lr_init", type=cli.positive_float, default=recipe["lr_init"], help="first learning rate")
    add("--epochs", type=cli.positive_int, default=recipe["epochs"], help="at most")
    add("--seed", type=cli.seed, default=recipe["seed"], help="of the training")
    add("--train_flags", default="", metavar="'FLAGS'", help="further flags of the defence's train.py")
    add("--skip", type=cli.positive_int, default=20, help="every skip-th test image is certified")
    add("--N", type=cli.positive_int, default=10_000, help="draws per image, at most if --sequential")
    add("--sequential", action="store_true", help="stop an image's draws early, with an anytime-valid bound")
    return parser.parse_args()


class _SecondEpoch(Exception):  # noqa: N818 - no error
    """A run has come so far."""


class _Steps:
    """The steps that the flags name."""

    def __init__(self, session: Session, args: Namespace):
        self.session, self.args, self.output = session, args, args.output
        self.networks = {_named(heads): heads for heads in (args.num_heads, 1)}

    def __iter__(self) -> Iterator[Step]:
        yield Step("tests", self._test, needs=60, budget="tests")
        yield Step("speed", self._measure, needs=20, budget="speed")
        for name in self.networks:
            train = f"train-{name}"
            yield Step(train, lambda name=name: self._train(name))
            yield Step(f"release-{name}", lambda name=name: self._release(name), needs=5, after=train)
        for name in self.networks:
            yield Step(f"certify-{name}", lambda name=name: self._certify(name), needs=30, after=f"train-{name}")

    # --- tests and speed ---

    def _test(self) -> None:
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-v", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") and self.args.device != "cpu":  # there they are skipped
            command += ["-n", min(_PROCESSES, os.cpu_count() or 1)]
        self.session.run("tests", command, _CODES.parent)

    def _measure(self) -> None:
        command = [sys.executable, _CODES / "bench" / "bench_speeds.py", "--device", self.args.device]
        command += ["--seconds", self.args.speed_seconds, "--json", self._speeds, *["--tiny"] * self.args.tiny]
        self.session.run("speed", command, _CODES)

    @property
    def _speeds(self) -> Path:
        return self.output / "bench" / "speeds.json"

    # --- the number of epochs ---

    def _plan(self) -> dict:
        """How many epochs fit, when the learning rate drops, and whether each network is compiled."""
        args, (_, rows) = self.args, read_speeds(self._speeds)
        paces = [self._paces(name, rows) for name in self.networks]
        left = self.session.left()
        planned = left - min(self._certification(rows, left), (1 - args.training_share) * left)
        epochs, chosen = epochs_within(0.95 * planned, paces, args.epochs)
        if epochs < min(3, args.epochs):
            epoch = sum(pace.epoch for pace in chosen)
            minutes = f"{max(planned, 0) / 60:.1f} minutes hold less than 3"
            raise OutOfTimeError(f"an epoch of {' and of '.join(self.networks)} takes {epoch:.1f} s: {minutes}")
        networks = {}
        for name, pace in zip(self.networks, chosen, strict=True):
            seconds = round(pace.start + epochs * pace.epoch, 1)
            networks[name] = {"compiled": pace.compiled, "seconds": seconds, "seconds_an_epoch": round(pace.epoch, 2)}
            say(f"{name}: an epoch takes {pace.epoch:.1f} s{', compiled' * pace.compiled}; {epochs} epochs")
        return {"epochs": epochs, "lr_step_size": math.ceil(epochs / 3), "networks": networks}

    def _paces(self, name: str, rows: list[dict]) -> list[Pace]:
        """From the speeds, where they are those of this training, else from two epochs."""
        args, recipe = self.args, Recipe()
        measured = rows_of(rows, task="train", batch_size=recipe.batch_size, **self._describe(name))
        if not measured or args.defence != "0Gaussian" or args.train_flags:
            return [self._try(name)]
        return paces_of(measured, self._batches * recipe.num_noise_vec) or [self._try(name)]

    @functools.cached_property
    def _batches(self) -> int:
        """Of an epoch."""
        return open_split(self.args.dataset, self.args.data_dir, train=True, device=_CPU).num_batches(
            Recipe().batch_size
        )

    def _describe(self, name: str) -> dict:
        """A network as the speeds' rows describe it."""
        described = {key: getattr(self.args, key) for key in ("arch", "dataset", "precision")}
        return described | {"heads": self.networks[name]}

    def _certification(self, rows: list[dict], otherwise: float) -> float:
        """The seconds that certifying takes with all networks; `otherwise` where no speed is known."""
        args = self.args
        measured = [rows_of(rows, task="certify", **self._describe(name)) for name in self.networks]
        if not all(measured):
            return otherwise
        images = math.ceil(len(open_split(args.dataset, args.data_dir, train=False, device=_CPU)) / args.skip)
        draws = images * (CertifySettings.N0 + args.N)
        each = [certification_seconds(own, draws) for own in measured]
        return otherwise if None in each else sum(each)

    def _try(self, name: str) -> Pace:
        """The pace of a run that is ended after its second epoch."""
        args, folder, times = self.args, self.output / "work" / "two-epochs", [time.monotonic()]
        shutil.rmtree(folder, ignore_errors=True)
        folders = [part for kind in ("save", "logs", "runs") for part in (f"--{kind}_dir", folder / kind)]
        flags = [*self._train_flags(name, args.epochs, math.ceil(args.epochs / 3)), "--seed", args.seed, *folders]

        def notice(line: str) -> None:
            """Take the time of an epoch's end."""
            if re.match(r"epoch \d+/", line):
                times.append(time.monotonic())
                if len(times) == 3:
                    raise _SecondEpoch

        with contextlib.suppress(_SecondEpoch):
            self.session.run("two-epochs", [sys.executable, "train.py", *flags], _CODES / args.defence, notice)
        shutil.rmtree(folder)
        if len(times) < min(3, 1 + args.epochs):
            raise RunError("train.py did not say when its first epochs ended")
        started, first, *second = times
        epoch = second[0] - first if second else first - started
        return Pace(max(first - started - epoch, 0), epoch)

    # --- training ---

    def _train(self, name: str) -> None:
        if "plan" not in self.session.state:
            self.session.remember("plan", self._plan())
        job = self._job(name)
        make_folder(job.folder)
        check_unchanged(job)
        write_record(job, finished=False)
        try:
            self.session.run(
                f"train-{name}", train_command(job), job.scripts, lambda line: remove_old_checkpoints(job, keep=2)
            )
        finally:
            self._copy_logs(job)

    def _train_flags(self, name: str, epochs: int, lr_step_size: int) -> list:
        args = self.args
        flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--arch", args.arch]
        flags += ["--num_heads", self.networks[name], "--noise_sd", args.noise_sd, "--lr_init", args.lr_init]
        flags += ["--lbdlast", args.lbdlast] if args.lbdlast is not None else []
        flags += ["--epochs", epochs, "--lr_step_size", lr_step_size, "--precision", args.precision]
        return [*flags, "--test_freq", 5, "--device", args.device, *shlex.split(args.train_flags)]

    def _job(self, name: str) -> Job:
        """Training and certification as a queue runs them: see experiments.py."""
        args, plan = self.args, self.session.state["plan"]
        own = plan["networks"][name]
        train = self._train_flags(name, plan["epochs"], plan["lr_step_size"]) + ["--compile"] * own["compiled"]
        train += ["--save_freq", max(1, round(_BETWEEN_CHECKPOINTS / own["seconds_an_epoch"]))]
        certify = ["--data_dir", args.data_dir, "--skip", args.skip, "--N", args.N, "--device", args.device]
        certify += ["--precision", args.precision, *["--sequential"] * args.sequential]
        flags = [tuple(map(str, one)) for one in (train, certify)]
        return Job(f"{args.defence}/{name}/seed-{args.seed}", _CODES, self.output / "work", args.seed, *flags)

    # --- what training leaves ---

    def _release(self, name: str) -> None:
        args, checkpoint = self.args, last_checkpoint(self._job(name))
        released = f"{args.defence[1:]}-{args.dataset}-{args.arch}-{args.noise_sd}-{name}.pth".lower()
        whole, folder = self.output / "work" / released, make_folder(self.output / "release")
        for old in (whole, *folder.glob(f"{released}.*")):
            old.unlink(missing_ok=True)
        release(checkpoint, whole)
        cut(whole, folder, _PART[args.tiny])
        say(f"'{folder}' holds {released} in parts; join.sh joins them")

    def _certify(self, name: str) -> None:
        job = self._job(name)
        try:
            self.session.run(f"certify-{name}", certify_command(job), job.scripts)
        finally:
            self._copy_logs(job)

    def _copy_logs(self, job: Job) -> None:
        if (job.folder / "logs").exists():
            shutil.copytree(job.folder / "logs", self.output / "logs", dirs_exist_ok=True)

    def write_summary(self) -> None:
        """O/summary.md, as things stand."""
        unfinished = self.session.left_out | {name: f"failed: {why}" for name, why in self.session.failed.items()}
        text = page(self.output, self.session.state, unfinished)
        replace_file(self.output / "summary.md", text)


def _named(heads: int) -> str:
    return f"{heads}-head{'s' * (heads > 1)}"


def _main() -> None:
    args = _flags()
    defences = sorted(file.parent.name for file in _CODES.glob("*/train.py"))
    if args.defence not in defences:
        raise UserError(f"--defence '{args.defence}' must be one of {', '.join(defences)}")
    try:
        shlex.split(args.train_flags)
    except ValueError as error:
        raise UserError(f"--train_flags '{args.train_flags}': {error}") from error
    if args.lbdlast is None:
        args.lbdlast = _PAPERS_PACE.get((args.defence, args.noise_sd))
    args.speed_seconds = args.speed_seconds or 60 * args.minutes / 9
    args.output, args.data_dir = (path.expanduser().resolve() for path in (args.output, args.data_dir))
    make_folder(args.output)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    taken = f"another session, or a command that one started, is still at work in '{args.output}'"
    with lock(args.output / "lock", taken) as held:
        settings = {name: value for name, value in vars(args).items() if name not in _FREE}
        budgets = {"tests": max(90, 6 * args.minutes), "speed": args.speed_seconds + _START}
        session = Session(args.output, settings, args.minutes, budgets, held)
        steps = _Steps(session, args)
        session.run_all(list(steps), steps.write_summary)
    if session.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(_main)
