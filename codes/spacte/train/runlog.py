"""Where a training run's files are, and its log: text, TensorBoard, terminal."""

import contextlib
import itertools
import math
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from spacte.files import lock, make_folder
from spacte.train.settings import Place, Recipe
from spacte.utils import UserError


@dataclass(frozen=True)
class TrainingPaths:
    """Where a run's files are."""

    checkpoints: Path
    tensorboard: Path
    log: Path

    @classmethod
    def of(cls, recipe: Recipe, place: Place, run: str) -> "TrainingPaths":
        """The paths of the run named `run` under the place's folders; UserError if two would be one folder."""
        if Path(place.save_dir).resolve() == Path(place.runs_dir).resolve():
            raise UserError(f"--save_dir and --runs_dir are both '{place.save_dir}': give two folders")
        tail = recipe.tail
        return cls(
            Path(place.save_dir) / tail / run,
            Path(place.runs_dir) / tail / run,
            Path(place.logs_dir) / tail / "train" / f"{run}-train.log",
        )

    def checkpoint(self, epoch: int) -> Path:
        """The file of an epoch's checkpoint."""
        return self.checkpoints / f"epoch{epoch}.pth"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that the run writes to."""
        return self.checkpoints, self.tensorboard, self.log.parent

    def make_folders(self) -> None:
        """Create all of them; UserError if this is not possible."""
        for folder in self.folders:
            make_folder(folder)

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, newest first."""
        names = [path.stem.removeprefix("epoch") for path in self.checkpoints.glob("epoch*.pth")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


class TrainingLog:
    """A run's text log (tab separated, one row per epoch), its TensorBoard files and its lines on the terminal.

    `text` is the log so far; a checkpoint keeps it, so that a resumed run knows its own log and ends it as if it had
    never been interrupted. What another run of the same name has left is renamed, so that nothing is lost. Raises
    UserError if another process trains the same run or writes the same log, or it cannot be written.
    """

    def __init__(self, paths: TrainingPaths, epochs: int, epochs_done: int, text: str):
        self.path, self.epochs = paths.log, epochs
        self._lock = lock(paths.checkpoints / "lock", f"another process is training '{paths.checkpoints}'")
        for left in paths.checkpoints.glob(".*.tmp"):  # under the lock all are dead, whichever machine wrote them
            left.unlink(missing_ok=True)
        taken = f"another process is writing '{paths.log}': give another --logs_dir"
        self._file = lock(paths.log, taken)
        there, self.text = paths.log.read_text(), text
        if epochs_done and there.startswith(self.text):  # later epochs are trained, and logged, again
            self._file.truncate(len(self.text.encode()))
        elif epochs_done and self.text.startswith(there):  # its end was lost
            self._append(self.text[len(there) :])
        else:  # another run's, or none
            for path in (paths.log, paths.tensorboard):
                _set_aside(path)
            self._file.close()
            self._file = lock(paths.log, taken)
            self._append(self.text)
        threading.excepthook = _say_nothing_of_tensorboard
        self.tensorboard: SummaryWriter | None = None
        with self._while_tensorboard_writes():
            purged = epochs_done + 1 if epochs_done else None
            self.tensorboard = SummaryWriter(paths.tensorboard, purge_step=purged)

    def _append(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint that is on disk is not ahead of its log
        except OSError as error:
            raise UserError(f"cannot write '{self.path}': {error.strerror or error}") from error

    def write(self, row: dict) -> None:
        """Log one epoch's figures."""
        figures = {name: value for name, value in row.items() if name != "left"}
        columns = self.text.split("\n", 1)[0].split("\t") if self.text else list(figures)  # an older version's has more
        line = "\t".join(f"{figures.get(name, math.nan):.6g}" for name in columns) + "\n"
        if not self.text:
            line = "\t".join(columns) + "\n" + line
        self._append(line)
        self.text += line
        self._show_on_tensorboard(row["epoch"], figures)
        pace = f"lambda {row['lambda']:.3f}  " if "lambda" in row else ""
        accuracy = f"noisy accuracy {row['acc']:.3f}  " if math.isfinite(row["acc"]) else ""
        tqdm.write(
            f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.4f}  lr {row['lr']:g}  "
            f"{pace}{accuracy}{row['images_per_second']:.0f} images/s  {row['left']} left"
        )

    def _show_on_tensorboard(self, epoch: int, figures: dict) -> None:
        if self.tensorboard is None:
            return
        with self._while_tensorboard_writes():
            for name, value in figures.items():
                if name != "epoch" and math.isfinite(value):
                    self.tensorboard.add_scalar(_tag(name), value, epoch)
            self.tensorboard.flush()

    @contextlib.contextmanager
    def _while_tensorboard_writes(self) -> Iterator[None]:
        """If its files cannot be written, training continues without: they only show what the log holds."""
        try:
            yield
        except OSError as error:
            warnings.warn(f"TensorBoard shows nothing more; training continues: {error}", stacklevel=1)
            self.tensorboard = None


def _say_nothing_of_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """A threading.excepthook silent about an OSError in TensorBoard's thread: TrainingLog meets it and warns."""
    if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failed)


def _tag(name: str) -> str:
    """TensorBoard's group of a figure: accuracy, loss or run."""
    if name.startswith("acc"):
        return f"accuracy/{name}"
    return f"run/{name}" if name in ("lr", "lambda", "images_per_second", "weight", "easy") else f"loss/{name}"


def _set_aside(path: Path) -> None:
    """Rename a file or folder that holds something to <name>.1, <name>.2, ...: the first one that is free."""
    holds = any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size
    if holds:
        number = next(k for k in itertools.count(1) if not path.with_name(f"{path.name}.{k}").exists())
        path.rename(path.with_name(f"{path.name}.{number}"))
        print(f"an earlier '{path}' is now '{path.name}.{number}'")
