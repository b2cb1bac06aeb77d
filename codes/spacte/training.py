"""One training run: loop, evaluation, checkpoints, resume, logs.

    flags -> data -> classifier -> objective -> epochs -> checkpoint

A batch of `batch_size` images is split into m mini-batches, each repeated m times with fresh noise: m optimiser
steps of `batch_size` noisy images (METHOD: Training).
"""

import math
import time
from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from spacte import checkpoint, cli
from spacte.data import DATASETS, Split, open_split
from spacte.model import ARCHITECTURES, build_classifier
from spacte.objective import Objective, unwrapped
from spacte.utils import (
    UserError,
    autocast,
    derived_seed,
    make_folder,
    package_versions,
    process_count,
    process_rank,
    replace_file,
    restore_rng_state,
    rng_state,
    run_tail,
    select_device,
)

# Flags that a resumed run may change: they say where and how it runs, not what it computes.
_FREE_FLAGS = {"data_dir", "logs_dir", "save_dir", "runs_dir", "save_freq", "device", "workers", "resume"}
_STEPS_BETWEEN_CHECKS = 50  # losses wait on the device this long, so that no step waits for it


def main(objective: type[Objective], description: str, lbdlast: float) -> None:
    """The command line of a defence's train.py; `lbdlast` is its default pace."""
    cli.run(lambda: train(_flags(objective, description, lbdlast).parse_args(), objective))


def _flags(objective: type[Objective], description: str, lbdlast: float) -> cli.Parser:
    parser = cli.Parser(description)
    add = parser.add_argument
    add("--dataset", default="CIFAR10", help=f"one of {', '.join(DATASETS)}")
    add("--data_dir", default="./data", help="where the data set's files are, or are downloaded to")
    add("--arch", default="R110", help=f"one of {', '.join(ARCHITECTURES)}")
    add("--num_heads", type=cli.positive_int, default=5, help="L; 1 is the base defence alone")
    add("--noise_sd", type=cli.positive_float, default=0.25, help="sigma, in units of [0, 1]")
    add("--num_noise_vec", type=cli.positive_int, default=2, help="m, noise vectors an image")
    add("--lbdlast", type=cli.non_negative_float, default=lbdlast, help="lambda of the last epoch")
    add("--eps", type=cli.probability, default=0.8, help="the best head's share in the loss is 1 - eps")
    objective.add_flags(parser)
    add("--epochs", type=cli.positive_int, default=150)
    add("--batch_size", type=cli.positive_int, default=256, help="images a batch, over all processes")
    add("--lr_init", type=cli.positive_float, default=0.1, help="first learning rate")
    add("--lr_step_size", type=cli.positive_int, default=50, help="epochs between drops of the learning rate")
    add("--gamma", type=cli.positive_float, default=0.1, help="factor of such a drop")
    add("--wd", type=cli.non_negative_float, default=1e-4, help="weight decay")
    add("--seed", type=cli.non_negative_int, default=666)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network's arithmetic")
    add("--workers", type=cli.non_negative_int, default=4, help="processes that read ImageNet's files")
    add("--save_freq", type=cli.positive_int, default=10, help="epochs between checkpoints")
    add("--save_dir", default="./save", help="checkpoints: <save_dir>/<dataset>/<arch>/noise-<sd>/<run>/epochN.pth")
    add("--logs_dir", default="./logs", help="text logs")
    add("--runs_dir", default="./runs", help="TensorBoard files")
    add("--resume", action="store_true", help="go on after the newest whole checkpoint of this run, if there is one")
    return parser


@dataclass(frozen=True)
class RunPaths:
    """Where a run's files are."""

    checkpoints: Path
    tensorboard: Path
    log: Path

    @classmethod
    def of(cls, args: Namespace, run: str) -> "RunPaths":
        """The paths of the run named `run` under the flags' folders."""
        tail = run_tail(args.dataset, args.arch, args.noise_sd)
        return cls(
            Path(args.save_dir) / tail / run,
            Path(args.runs_dir) / tail / run,
            Path(args.logs_dir) / tail / "train" / f"{run}-train.log",
        )

    def checkpoint(self, epoch: int) -> Path:
        """The file of an epoch's checkpoint."""
        return self.checkpoints / f"epoch{epoch}.pth"

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, newest first."""
        names = [path.stem.removeprefix("epoch") for path in self.checkpoints.glob("epoch*.pth")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def run_name(args: Namespace, objective: type[Objective]) -> str:
    """The authors' name of a run, h-5-eps-0.8-m-2-lbdlast-1.2 and what the defence adds."""
    name = f"h-{args.num_heads}-eps-{args.eps}-m-{args.num_noise_vec}-lbdlast-{args.lbdlast}"
    return name + objective.run_suffix(args)


def train(args: Namespace, objective_type: type[Objective]) -> None:
    """Train as the flags say, and leave checkpoints, a text log and TensorBoard files.

    Raises UserError before anything is written where a flag, file or folder is wrong, and RunError with the epoch, the
    step and every part where the loss is not finite.
    """
    if args.batch_size < args.num_noise_vec:
        raise UserError(f"--batch_size {args.batch_size} is smaller than --num_noise_vec {args.num_noise_vec}")
    device = select_device(args.device)
    run = run_name(args, objective_type)
    paths = RunPaths.of(args, run)
    resumed = _resume_point(paths, args)
    train_split = open_split(args.dataset, args.data_dir, True, device, args.workers)
    test_split = open_split(args.dataset, args.data_dir, False, device, args.workers, train_split.spec)
    torch.manual_seed(args.seed)
    classifier = build_classifier(args.arch, train_split.spec, args.num_heads)
    objective = objective_type(args, train_split.spec.num_classes)
    trainer = Trainer(args, device, classifier, objective, train_split, test_split)
    if resumed:
        trainer.restore(resumed)
    if trainer.epoch == args.epochs:
        print(f"{paths.checkpoint(args.epochs)} is the last epoch: nothing is left to do")
        return
    for folder in (paths.checkpoints, paths.tensorboard, paths.log.parent):
        make_folder(folder)
    with RunLog(paths, trainer.epoch, args.epochs) as log:
        for row in trainer.epochs():
            log.write(row)
            epoch = row["epoch"]
            if epoch in (1, args.epochs) or epoch % args.save_freq == 0:
                contents = {**trainer.state(), "run": run, "defence": objective.name, "args": vars(args)}
                checkpoint.save(paths.checkpoint(epoch), contents)
    print(f"checkpoint: {paths.checkpoint(args.epochs)}\nlog: {paths.log}\nTensorBoard: {paths.tensorboard}")


def _resume_point(paths: RunPaths, args: Namespace) -> dict | None:
    """The newest whole checkpoint of the run where --resume asks for one.

    Raises UserError where the run has checkpoints and --resume is not given, or was made with other flags.
    """
    found = paths.epochs()
    if found and not args.resume:
        raise UserError(
            f"'{paths.checkpoints}' already holds epoch{found[0]}.pth: give --resume to go on from there, or another "
            "--save_dir"
        )
    for epoch in found:
        try:
            contents = checkpoint.read(paths.checkpoint(epoch))
        except UserError as error:
            tqdm.write(f"passed over: {error}")
            continue
        for name, value in vars(args).items():
            if name not in _FREE_FLAGS and contents["args"].get(name) != value:
                raise UserError(
                    f"--{name} {value} contradicts the run in '{paths.checkpoints}', which has {name} "
                    f"{contents['args'].get(name)}"
                )
        return contents
    return None


class Trainer:
    """A classifier, its optimiser and the data, an epoch at a time."""

    def __init__(
        self, args: Namespace, device: torch.device, classifier: nn.Sequential, objective: Objective,
        train_split: Split, test_split: Split,
    ):  # fmt: skip
        self.args, self.device, self.objective = args, device, objective
        self.train_split, self.test_split = train_split, test_split
        # fewer images cannot fill m mini-batches, nor give BatchNorm two values to compare
        self.smallest = max(2, args.num_noise_vec) * process_count()
        self.steps = train_split.num_batches(args.batch_size, self.smallest) * args.num_noise_vec
        if self.steps == 0:
            raise UserError(f"{len(train_split)} training images are too few: at least {self.smallest} are needed")
        self.classifier = classifier.to(device, memory_format=torch.channels_last)
        self.classifier.forward = autocast(device, args.precision)(self.classifier.forward)
        self.optimizer = torch.optim.SGD(
            classifier.parameters(), args.lr_init, momentum=0.9, weight_decay=args.wd, foreach=True
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, args.lr_step_size, args.gamma)
        self.epoch = 0  # epochs done
        torch.manual_seed(derived_seed(args.seed, process_rank()))

    def state(self) -> dict:
        """What a checkpoint holds of the training itself."""
        return {
            "state_dict": unwrapped(self.classifier).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "data": self.train_split.spec,
            "rng": rng_state(),
            "versions": package_versions(),
        }

    def restore(self, contents: dict) -> None:
        """Go on where `contents`, from `state`, stands. UserError where its data set is another."""
        if contents["data"] != self.train_split.spec:
            raise UserError(f"the data in '{self.args.data_dir}' differ from those that the run was started on")
        unwrapped(self.classifier).load_state_dict(contents["state_dict"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.scheduler.load_state_dict(contents["scheduler"])
        self.epoch = contents["epoch"]
        restore_rng_state(contents["rng"])

    def epochs(self):
        """Train to the last epoch; yields each epoch's figures by name."""
        total = self.args.epochs * self.steps
        with tqdm(total=total, initial=self.epoch * self.steps, unit="step", disable=None, dynamic_ncols=True) as bar:
            started, first = time.monotonic(), self.epoch
            while self.epoch < self.args.epochs:
                row = self._train_epoch(bar)
                row |= self.noisy_accuracy()
                done = (self.epoch - first) / (self.args.epochs - first)
                row["left"] = str(timedelta(seconds=round((time.monotonic() - started) * (1 / done - 1))))
                yield row

    def _train_epoch(self, bar: tqdm) -> dict:
        args, epoch = self.args, self.epoch + 1
        self.classifier.train()
        started = time.monotonic()
        learning_rate, pace = self.scheduler.get_last_lr()[0], self.objective.threshold(epoch)
        order = torch.Generator().manual_seed(derived_seed(args.seed, epoch))  # the same in every process
        meter = PartsMeter(epoch)
        for images, labels in self.train_split.batches(args.batch_size, order, self.smallest):
            for part in range(args.num_noise_vec):
                mine = slice(part, None, args.num_noise_vec)
                loss, parts = self.objective(self.classifier, images[mine], labels[mine], epoch)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                meter.add({"loss": loss, **parts}, len(labels[mine]))
                if len(meter.pending) == _STEPS_BETWEEN_CHECKS:
                    meter.flush()
                    bar.set_postfix(loss=f"{meter.means()['loss']:.3f}", lr=learning_rate, pace=f"{pace:.3f}")
                bar.update()
        meter.flush()
        self.scheduler.step()
        self.epoch = epoch
        means = meter.means()
        bar.set_postfix(loss=f"{means['loss']:.3f}", lr=learning_rate, pace=f"{pace:.3f}")
        seconds = time.monotonic() - started
        return {
            "epoch": epoch,
            "lr": learning_rate,
            "lambda": pace,
            **means,
            "images_per_second": meter.images / seconds,
        }

    @torch.no_grad()
    def noisy_accuracy(self) -> dict[str, float]:
        """The share of test images, each with one noise vector, that the ensemble (`acc`) and each head get right."""
        self.classifier.eval()
        generator = torch.Generator(self.device).manual_seed(derived_seed(self.args.seed, self.epoch, process_rank()))
        correct = torch.zeros(1 + self.args.num_heads, device=self.device)
        for images, labels in self.test_split.batches(self.args.batch_size):
            noise = torch.randn(images.shape, device=self.device, generator=generator) * self.args.noise_sd
            logits = unwrapped(self.classifier)(images + noise).float()  # [L, B, K]
            votes = torch.cat([logits.sum(0, keepdim=True), logits]).argmax(-1)  # [1 + L, B]
            correct += (votes == labels).sum(1)
        shares = (correct / len(self.test_split)).tolist()
        return {"acc": shares[0], **{f"acc{h}": share for h, share in enumerate(shares[1:])}}


class PartsMeter:
    """Means of the loss's parts over an epoch; the values stay on the device until `flush`."""

    def __init__(self, epoch: int):
        self.epoch, self.steps, self.images = epoch, 0, 0
        self.pending: list[Tensor] = []
        self.counts: list[int] = []
        self.sums: Tensor | None = None
        self.names: list[str] = []

    def add(self, parts: dict[str, Tensor], images: int) -> None:
        """Note one step's parts, scalars by name, weighted by its number of images."""
        self.names = list(parts)
        self.pending.append(torch.stack([part.detach().float() for part in parts.values()]))
        self.counts.append(images)

    def flush(self) -> None:
        """Fetch what is pending. Raises RunError with the epoch, the step and every part where one is not finite."""
        if not self.pending:
            return
        values = torch.stack(self.pending).double().cpu()  # [steps, parts]
        for step, row in enumerate(values, start=self.steps + 1):
            if not torch.isfinite(row).all():
                parts = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, row.tolist(), strict=True))
                raise cli.RunError(f"the loss is not finite in epoch {self.epoch}, step {step}: {parts}")
        total = torch.tensor(self.counts, dtype=torch.float64) @ values
        self.sums = total if self.sums is None else self.sums + total
        self.steps += len(self.counts)
        self.images += sum(self.counts)
        self.pending, self.counts = [], []

    def means(self) -> dict[str, float]:
        """The mean of each part over the images flushed so far."""
        return dict(zip(self.names, (self.sums / self.images).tolist(), strict=True))


class RunLog:
    """A run's text log (tab separated, one row an epoch), its TensorBoard files and its lines on the terminal."""

    def __init__(self, paths: RunPaths, epochs_done: int, epochs: int):
        self.path, self.epochs = paths.log, epochs
        kept = self._rows_up_to(epochs_done)
        replace_file(self.path, lambda temporary: temporary.write_text("".join(kept)))
        self.tensorboard = SummaryWriter(paths.tensorboard, purge_step=epochs_done + 1 if epochs_done else None)

    def _rows_up_to(self, epoch: int) -> list[str]:
        """The header and the rows that a resumed run keeps; later epochs are trained, and logged, again."""
        if epoch == 0 or not self.path.exists():
            return []
        header, *rows = self.path.read_text().splitlines(keepends=True) or [""]
        return [header, *(row for row in rows if row.endswith("\n") and int(row.split("\t")[0]) <= epoch)]

    def write(self, row: dict) -> None:
        """Log one epoch's figures."""
        left = row.pop("left")
        figures = {name: f"{value:.6g}" for name, value in row.items()}
        with open(self.path, "a") as file:
            if file.tell() == 0:
                file.write("\t".join(figures) + "\n")
            file.write("\t".join(figures.values()) + "\n")
        for name, value in row.items():
            if name != "epoch" and math.isfinite(value):
                self.tensorboard.add_scalar(_tag(name), value, row["epoch"])
        self.tensorboard.flush()
        tqdm.write(
            f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.4f}  lr {row['lr']:g}  "
            f"lambda {row['lambda']:.3f}  noisy accuracy {row['acc']:.3f}  "
            f"{row['images_per_second']:.0f} images/s  {left} left"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tensorboard.close()


def _tag(name: str) -> str:
    """TensorBoard's group of a figure: accuracy, loss or run."""
    if name.startswith("acc"):
        return f"accuracy/{name}"
    return f"run/{name}" if name in ("lr", "lambda", "images_per_second", "weight") else f"loss/{name}"
