"""Where a training run's files are, and its log: text, TensorBoard, terminal."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from spacte.train.settings import Place, Recipe
from spacte.utils import lock, make_folder, replace_file


@dataclass(frozen=True)
class RunPaths:
    """Where a run's files are."""

    checkpoints: Path
    tensorboard: Path
    log: Path

    @classmethod
    def of(cls, recipe: Recipe, place: Place, run: str) -> "RunPaths":
        """The paths of the run named `run` under the place's folders."""
        tail = recipe.tail
        return cls(
            Path(place.save_dir) / tail / run,
            Path(place.runs_dir) / tail / run,
            Path(place.logs_dir) / tail / "train" / f"{run}-train.log",
        )

    def checkpoint(self, epoch: int) -> Path:
        """The file of an epoch's checkpoint."""
        return self.checkpoints / f"epoch{epoch}.pth"

    def make_folders(self) -> None:
        """Create all of them; UserError where this is not possible."""
        for folder in (self.checkpoints, self.tensorboard, self.log.parent):
            make_folder(folder)

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, newest first."""
        names = [path.stem.removeprefix("epoch") for path in self.checkpoints.glob("epoch*.pth")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


class RunLog:
    """A run's text log (tab separated, one row an epoch), its TensorBoard files and its lines on the terminal.

    What a run of the same name has left where this one begins is renamed, so that nothing is lost. Raises UserError
    where another process trains the same run.
    """

    def __init__(self, paths: RunPaths, epochs_done: int, epochs: int):
        self.path, self.epochs = paths.log, epochs
        self._lock = lock(paths.checkpoints / "lock", f"another process is training '{paths.checkpoints}'")
        if epochs_done == 0:
            for path in (paths.log, paths.tensorboard):
                _set_aside(path)
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
        figures = {name: value for name, value in row.items() if name != "left"}
        with open(self.path, "a") as file:
            if file.tell() == 0:
                file.write("\t".join(figures) + "\n")
            file.write("\t".join(f"{value:.6g}" for value in figures.values()) + "\n")
        for name, value in figures.items():
            if name != "epoch" and math.isfinite(value):
                self.tensorboard.add_scalar(_tag(name), value, row["epoch"])
        self.tensorboard.flush()
        accuracy = f"noisy accuracy {row['acc']:.3f}  " if math.isfinite(row["acc"]) else ""
        tqdm.write(
            f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.4f}  lr {row['lr']:g}  "
            f"lambda {row['lambda']:.3f}  {accuracy}"
            f"{row['images_per_second']:.0f} images/s  {row['left']} left"
        )


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
