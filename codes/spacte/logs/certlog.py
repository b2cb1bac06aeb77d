"""The certification log: its rows, its reader, the two figures that papers quote.

Tab separated, header `idx label predict radius correct time`, one row per image (Cohen et al., ICML 2019).
"""

import codecs
import contextlib
import warnings
from collections.abc import Sequence
from datetime import timedelta
from decimal import ROUND_FLOOR, Context
from pathlib import Path

import numpy as np
import pandas as pd

from spacte.logs.runfiles import RunFiles
from spacte.utils import UserError

Radii = Sequence[float] | np.ndarray
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
HEADER = "\t".join(COLUMNS) + "\n"
_LEGAL = {
    "idx": (int, "an integer of at least 0", lambda x: x >= 0),
    "label": (int, "an integer of at least 0", lambda x: x >= 0),
    "predict": (int, "an integer of at least -1", lambda x: x >= -1),
    "radius": (float, "a number of at least 0", lambda x: x >= 0),
    "correct": (int, "0 or 1", lambda x: (x == 0) | (x == 1)),
}
_SIX_DIGITS_DOWN = Context(prec=6, rounding=ROUND_FLOOR)


def round_down(radius: float) -> str:
    """The radius with 6 significant digits, never above the radius itself: a log claims no more than was certified."""
    return f"{_SIX_DIGITS_DOWN.create_decimal(radius):f}"


def format_row(idx: int, label: int, predict: int, radius: float, seconds: float) -> str:
    """One line of a log. `correct` is 1 where `predict` is `label`; an abstention (-1, radius 0) is not."""
    columns = (idx, label, predict, round_down(radius), int(predict == label), elapsed(seconds))
    return "\t".join(str(column) for column in columns) + "\n"


def elapsed(seconds: float) -> str:
    """A duration as the logs' last column holds it: h:mm:ss.ffffff."""
    return str(timedelta(seconds=seconds))


def read_log(path: Path | str) -> pd.DataFrame:
    """A log as a table with COLUMNS, one row per image; see `read_table`.

    A warning says where figures of the table are lower bounds, because the configuration beside the log says that draws
    ended early.
    """
    table = read_table(path)
    with contextlib.suppress(UserError):
        if RunFiles(Path(path)).read_json().config.sequential is not None:
            warnings.warn(
                f"'{path}' is a --sequential run's: its ACR is a lower bound, and so is certified accuracy at radii "
                "that its stopping rule did not decide; report.py tells which",
                stacklevel=2,
            )
    return table


def read_table(path: Path | str) -> pd.DataFrame:
    """A log as a table with COLUMNS, one row per image, any writer's (the authors', Cohen's, ours).

    Copies by other programs are read as well: separated by commas, or in UTF-16. Only `time` may be missing. A last
    line that was cut short is dropped with a warning. Raises UserError that names the file and the line where a value
    is not what the column holds, and where an idx comes twice.
    """
    try:
        encoding, header = beginning(path)
        separator = "," if "," in header and "\t" not in header else "\t"
        table = pd.read_csv(
            path, sep=separator, encoding=encoding, dtype=str, keep_default_na=False, skip_blank_lines=False
        )
    except pd.errors.EmptyDataError as error:
        raise UserError(f"'{path}' is not a certification log: it is empty") from error
    except OSError as error:
        raise UserError(f"'{path}' is not a certification log: {error.strerror}") from error
    except (pd.errors.ParserError, UnicodeError) as error:
        reason = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise UserError(f"'{path}' is not a certification log: {reason}") from error
    columns = list(_LEGAL)
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"'{path}', line 1: this is not a certification log: it has no column {', '.join(missing)}")
    last = int(np.flatnonzero((table != "").any(axis=1)).max(initial=-1))
    table = table.iloc[: last + 1]  # without blank lines at the end
    if len(table) and (table[columns].iloc[-1] == "").any():
        warnings.warn(f"'{path}', line {len(table) + 1}: cut short, dropped", stacklevel=2)
        table = table.iloc[:-1]
    if table.empty:
        raise UserError(f"'{path}' is a certification log without a row")
    table = table.assign(**{name: _legal_numbers(table[name], path) for name in columns})
    contradiction = (table["label"] == table["predict"]) != table["correct"]
    if contradiction.any():
        raise UserError(f"'{path}', line {first_line(contradiction)}: correct contradicts label and predict")
    twice = table["idx"].duplicated()
    if twice.any():
        raise UserError(f"'{path}', line {first_line(twice)}: idx {table['idx'][twice].iloc[0]} occurs twice")
    return table


def beginning(path: Path | str) -> tuple[str, str]:
    """A text file's encoding, by its first bytes (UTF-8 or UTF-16), and its first line. OSError if it is unreadable."""
    with open(path, "rb") as file:
        start = file.read(4096)
    encoding = "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return encoding, start.decode(encoding, errors="replace").partition("\n")[0].rstrip("\r")


def first_line(rows: pd.Series) -> int:
    """The line of a log on which the first marked row of its table stands."""
    return int(rows.to_numpy().argmax()) + 2


def _legal_numbers(column: pd.Series, path: Path | str) -> pd.Series:
    kind, legal, accept = _LEGAL[column.name]
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    wrong = ~(np.isfinite(numbers) & ((numbers % 1 == 0) & (numbers < 2**53) | (kind is float)) & accept(numbers))
    if wrong.any():
        text = column[wrong].iloc[0]
        raise UserError(f"'{path}', line {first_line(wrong)}: {column.name} '{text}' must be {legal}")
    return numbers.astype(kind)


def certified_radius(table: pd.DataFrame) -> np.ndarray:
    """Each image's certified radius, 0 where it is wrong or abstained: [images]."""
    return table["correct"].to_numpy(float) * table["radius"].to_numpy(float)


def certified_at(table: pd.DataFrame, radii: Radii) -> np.ndarray:
    """Whether each image is correct with at least each of the radii: [len(radii), images]."""
    radius, correct = table["radius"].to_numpy(float), table["correct"].to_numpy(float) == 1
    return correct & (radius >= np.atleast_1d(np.asarray(radii, dtype=float))[:, None])


def average_certified_radius(table: pd.DataFrame) -> float:
    """ACR: the mean over all images, abstentions and errors too, of correct * radius."""
    return float(certified_radius(table).mean())


def acr_standard_error(table: pd.DataFrame) -> float:
    """The standard error of the ACR as a mean over images; NaN for one image, which has none."""
    radii = certified_radius(table)
    return float(radii.std(ddof=1) / np.sqrt(len(radii))) if len(radii) > 1 else float("nan")


def certified_accuracy(table: pd.DataFrame, radii: Radii) -> np.ndarray:
    """The share of all images that are correct with at least each of the radii: [len(radii)], in [0, 1]."""
    return certified_at(table, radii).mean(axis=1)
