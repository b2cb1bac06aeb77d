"""Use a GPU that is there for a limited time: its tests, its speed, a training run, the run's certificates and files.

    python codes/gpu_session.py --dataset ImageFolder --data_dir D --output O --minutes 25
    python codes/gpu_session.py --dataset digits --arch R8 --epochs 4 --N 500 --output O --minutes 9 --device cpu --tiny

The second one tries it out without a GPU. The steps come in this order, and which are finished stands in O. Started
again with the same O, the session goes on: what is finished is skipped, training goes on after its last epoch,
certification after its last image. It may be killed at any moment.

    tests      tests/test_gpu.py
    bench-...  bench.py for certification and training: R110 with 5 heads at 32x32 and R50 with 2 heads at 224x224,
               tf32 and bf16, with and without --compile, batches of 1000 to 8192 (training: 256, the paper's)
    train      train.py of --defence, for as many epochs as the time allows, at most --epochs. A run's first two epochs
               are trained before for their time on this machine; the number that fits into --training_share of the time
               left is written down, and the learning rate drops after each third of it, as the paper's does
    release    the checkpoint without its optimiser, in parts below 16 MiB: before what may take all the time left
    certify    certify_mhead.py on every --skip-th test image

A step that the time left cannot hold is not begun and is named, and one that is under way when the time is over is
ended: training and certification lose no more than an epoch or a few images. How long a step takes is what those like
it took, else a guess. A step that fails is reported, the next one goes on, and the exit code is 1.

    O/session.json                       settings, steps, the number of epochs
    O/output/<step>.txt                  what each step has printed
    O/bench/<step>.json                  speeds
    O/logs/                              logs of training and certification, with every vote
    O/release/                           the checkpoint's parts, its SHA-256, and in join.sh the command that joins them
    O/work/                              checkpoints: what a session needs to go on
"""

import contextlib
import itertools
import math
import re
import shlex
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spacte import cli
from spacte.jobs.job import Job, check_unchanged, commands, record, remove_old_checkpoints
from spacte.jobs.session import OutOfTimeError, Session, Step, say
from spacte.train.settings import Recipe
from spacte.utils import RunError, UserError, lock, make_folder, sha256

_CODES = Path(__file__).resolve().parent
# what a session that goes on may change
_FREE = ("data_dir", "device", "output", "minutes", "bench_minutes", "training_share")


@dataclass(frozen=True)
class _Scale:
    """How large the steps are, beside what flags say."""

    networks: tuple[tuple[str, str, int], ...]  # what bench.py measures: architecture, data set, heads
    precisions: tuple[str, ...]
    compiled: tuple[bool, ...]
    certify_batches: tuple[int, ...]
    train_batches: tuple[int, ...]
    turns: int  # of bench.py
    seconds: float
    batch_size: int  # of certification
    part: int  # bytes of a part of the released checkpoint


_FULL = _Scale(
    networks=(("R110", "CIFAR10", 5), ("R50", "ImageNet", 2)),
    precisions=("tf32", "bf16"),
    compiled=(False, True),
    certify_batches=(1000, 2048, 4096, 8192),
    train_batches=(256,),
    turns=3,
    seconds=1.0,
    batch_size=4096,
    part=15 * 2**20,
)
_TINY = _Scale(
    networks=(("R8", "digits", 2),),
    precisions=("fp32",),
    compiled=(False,),
    certify_batches=(32,),
    train_batches=(32,),
    turns=1,
    seconds=0.05,
    batch_size=1000,
    part=2**17,
)


def _flags() -> Namespace:
    parser = cli.Parser(__doc__)
    add, recipe = parser.add_argument, cli.defaults_of(Recipe)
    add("--output", type=Path, required=True, metavar="O", help="where everything goes")
    add("--minutes", type=cli.positive_float, required=True, help="how long the GPU is there, from now on")
    add("--bench_minutes", type=cli.positive_float, default=8, help="of these, at most for speed")
    share = "of the time left after tests and speed, what training may plan for; the rest is certification's"
    add("--training_share", type=cli.open_probability, default=0.6, help=share)
    add("--dataset", default=recipe["dataset"], help="what is trained on and certified")
    add("--data_dir", type=Path, default=Path("data"), help="where its files are")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--tiny", action="store_true", help="speed of a tiny network alone: to try a session out on a CPU")
    add("--defence", default="0Gaussian", help="the folder of the base defence")
    add("--arch", default=recipe["arch"], help="of the network that is trained")
    add("--num_heads", type=cli.positive_int, default=recipe["num_heads"], help="L")
    add("--noise_sd", type=cli.positive_float, default=recipe["noise_sd"], help="sigma, in units of [0, 1]")
    add("--lbdlast", type=cli.pace, help="lambda in the last epoch (the defence's own)")
    add("--lr_init", type=cli.positive_float, default=recipe["lr_init"], help="first learning rate")
    add("--epochs", type=cli.positive_int, default=recipe["epochs"], help="at most")
    add("--seed", type=cli.seed, default=recipe["seed"], help="of the training")
    add("--train_flags", default="", metavar="'FLAGS'", help="further flags of the defence's train.py")
    add("--compile", action="store_true", help="train and certify through torch.compile")
    add("--skip", type=cli.positive_int, default=20, help="every skip-th test image is certified")
    add("--N", type=cli.positive_int, default=100_000, help="draws an image, at most if --sequential")
    add("--sequential", action="store_true", help="stop an image's draws early, with an anytime-valid bound")
    return parser.parse_args()


class _SecondEpoch(Exception):  # noqa: N818 - no error
    """A run has come so far."""


class _Steps:
    """The steps that the flags name."""

    def __init__(self, session: Session, args: Namespace):
        self.session, self.args, self.output = session, args, args.output
        self.scale = _TINY if args.tiny else _FULL

    def __iter__(self) -> Iterator[Step]:
        yield Step("tests", self._test, like="tests", guess=180)
        yield from self._bench_steps()
        yield Step("train", self._train)
        yield Step("release", self._release, like="release", guess=20, after="train")
        yield Step("certify", self._certify, after="train")

    def _test(self) -> None:
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-v", "-p", "no:cacheprovider"]
        self.session.run("tests", command, _CODES.parent)

    def _bench_steps(self) -> Iterator[Step]:
        """What is quick to measure first, of all networks."""
        scale = self.scale
        tasks = (("certify", scale.certify_batches), ("train", scale.train_batches))
        for compiled, network, (task, batches), precision in itertools.product(
            scale.compiled, scale.networks, tasks, scale.precisions
        ):
            for batch_size in batches:
                yield self._bench_step(task, *network, precision, compiled, batch_size)

    def _bench_step(
        self, task: str, arch: str, dataset: str, heads: int, precision: str, compiled: bool, batch_size: int
    ) -> Step:
        name = f"bench-{task}-{arch}-{heads}-heads-{precision}{'-compiled' * compiled}-{batch_size}"
        command = [sys.executable, _CODES / "bench.py", "--task", task, "--arch", arch, "--dataset", dataset]
        command += ["--num_heads", heads, "--device", self.args.device, "--precision", precision]
        command += [*["--compile"] * compiled, "--batch_size", batch_size]
        command += ["--turns", self.scale.turns, "--seconds", self.scale.seconds]
        command += ["--json", self.output / "bench" / f"{name}.json"]
        like, guess = f"bench {arch}{', compiled' * compiled}", 150 if compiled else 45
        return Step(name, lambda: self.session.run(name, command, _CODES), like, guess, budget="bench")

    def _train(self) -> None:
        if "plan" not in self.session.state:
            self.session.remember("plan", self._plan())
        job = self._job()
        make_folder(job.folder)
        check_unchanged(job)
        record(job, finished=False)
        command = next(commands(job))
        try:
            self.session.run("train", command, job.scripts, lambda line: remove_old_checkpoints(job, keep=2))
        finally:
            self._copy_logs(job)

    def _plan(self) -> dict:
        """How many epochs fit, and when the learning rate drops: from a run that is ended after its second epoch."""
        args, folder, times = self.args, self.output / "work" / "two-epochs", [time.monotonic()]
        shutil.rmtree(folder, ignore_errors=True)
        folders = [part for kind in ("save", "logs", "runs") for part in (f"--{kind}_dir", folder / kind)]
        flags = [*self._train_flags(args.epochs, math.ceil(args.epochs / 3)), "--seed", args.seed, *folders]

        def notice(line: str) -> None:
            """Take the time of an epoch's end."""
            if re.match(r"epoch \d+/", line):
                times.append(time.monotonic())
                if len(times) == 3:
                    raise _SecondEpoch

        with contextlib.suppress(_SecondEpoch):
            self.session.run("two-epochs", [sys.executable, "train.py", *flags], _CODES / args.defence, notice)
        shutil.rmtree(folder)
        if len(times) < 3 and args.epochs > 1:
            raise RunError("train.py did not say when its first two epochs ended")
        started, first, *second = times
        epoch = second[0] - first if second else first - started
        planned = args.training_share * self.session.left() - max(first - started - epoch, 0)
        epochs = min(args.epochs, int(0.95 * planned / epoch))
        if epochs < min(3, args.epochs):
            raise OutOfTimeError(f"an epoch takes {epoch:.0f} s: {max(planned, 0) / 60:.1f} minutes hold less than 3")
        say(f"train: an epoch takes {epoch:.1f} s, so {epochs} epochs")
        return {"epochs": epochs, "lr_step_size": math.ceil(epochs / 3), "seconds_an_epoch": round(epoch, 2)}

    def _train_flags(self, epochs: int, lr_step_size: int) -> list:
        args = self.args
        flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--arch", args.arch]
        flags += ["--num_heads", args.num_heads, "--noise_sd", args.noise_sd, "--lr_init", args.lr_init]
        flags += ["--lbdlast", args.lbdlast] if args.lbdlast is not None else []
        flags += ["--epochs", epochs, "--lr_step_size", lr_step_size, "--save_freq", 1, "--device", args.device]
        return flags + ["--compile"] * args.compile + shlex.split(args.train_flags)

    def _certify_flags(self) -> list:
        args = self.args
        flags = ["--data_dir", args.data_dir, "--skip", args.skip, "--N", args.N, "--device", args.device]
        flags += ["--batch_size", self.scale.batch_size]
        return flags + ["--sequential"] * args.sequential + ["--compile"] * args.compile

    def _job(self) -> Job:
        """Training and certification as a queue runs them: see experiments.py."""
        args, plan = self.args, self.session.state["plan"]
        train = self._train_flags(plan["epochs"], plan["lr_step_size"])
        flags = [tuple(map(str, own)) for own in (train, self._certify_flags())]
        name = f"{args.defence}/session/seed-{args.seed}"
        return Job(name, _CODES, self.output / "work", args.seed, *flags)

    def _release(self) -> None:
        args, checkpoint = self.args, self._certify_command(self._job())[-1]
        name = f"{args.defence[1:]}-{args.dataset}-{args.arch}-{args.noise_sd}-{args.num_heads}-heads.pth".lower()
        whole, folder = self.output / "work" / name, self.output / "release"
        whole.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, _CODES / "release.py", checkpoint, "--output", whole]
        self.session.run("release", command, _CODES)
        say(f"the command that joins the parts: {cut(whole, make_folder(folder), self.scale.part)}")

    def _certify(self) -> None:
        job = self._job()
        try:
            self.session.run("certify", self._certify_command(job), job.scripts)
        finally:
            self._copy_logs(job)

    def _certify_command(self, job: Job) -> list[str]:
        """The checkpoint comes last. RunError where there is none."""
        _, command = commands(job)
        return command

    def _copy_logs(self, job: Job) -> None:
        if (job.folder / "logs").exists():
            shutil.copytree(job.folder / "logs", self.output / "logs", dirs_exist_ok=True)


def cut(path: Path, folder: Path, size: int) -> str:
    """Cut a file into parts of at most `size` bytes, <name>.part-000, ...; returns the command that joins them.

    Beside the parts lie <name>.sha256, by which the command checks the result, and join.sh, which holds the command.
    """
    with open(path, "rb") as file:
        for number, part in enumerate(iter(lambda: file.read(size), b"")):
            (folder / f"{path.name}.part-{number:03}").write_bytes(part)
    (folder / f"{path.name}.sha256").write_text(f"{sha256(path)}  {path.name}\n")
    command = f"cat {path.name}.part-* > {path.name}; sha256sum -c {path.name}.sha256"
    (folder / "join.sh").write_text(command + "\n")
    return command


def _main() -> None:
    args = _flags()
    defences = sorted(file.parent.name for file in _CODES.glob("*/train.py"))
    if args.defence not in defences:
        raise UserError(f"--defence '{args.defence}' must be one of {', '.join(defences)}")
    try:
        shlex.split(args.train_flags)
    except ValueError as error:
        raise UserError(f"--train_flags '{args.train_flags}': {error}") from error
    args.output, args.data_dir = (path.expanduser().resolve() for path in (args.output, args.data_dir))
    make_folder(args.output)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    taken = f"another session, or a command that one started, is still at work in '{args.output}'"
    with lock(args.output / "lock", taken) as held:
        settings = {name: value for name, value in vars(args).items() if name not in _FREE}
        session = Session(args.output, settings, args.minutes, {"bench": 60 * args.bench_minutes}, held)
        session.work_off(list(_Steps(session, args)))
    if session.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(_main)
