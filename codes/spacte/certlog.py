"""The certification log: its rows, its reader, the two figures that everybody quotes.

Tab separated, header `idx label predict radius correct time`, one row an image (Cohen et al., ICML 2019).
"""

from datetime import timedelta
from decimal import ROUND_FLOOR, Context
from pathlib import Path

import numpy as np
import pandas as pd

from spacte.utils import UserError

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
HEADER = "\t".join(COLUMNS) + "\n"
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


def read_log(path: Path | str, columns=COLUMNS) -> pd.DataFrame:
    """A log as a table with `columns`, one row an image, any writer's (the authors', Cohen's, ours).

    Raises UserError with the file and what is wrong with it.
    """
    try:
        table = pd.read_csv(path, sep="\t")
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is no certification log: {error}") from error
    missing = [name for name in columns if name != "time" and name not in table]
    if missing:
        raise UserError(f"'{path}' is no certification log: it has no column {', '.join(missing)}")
    if table.empty:
        raise UserError(f"'{path}' is a certification log without a row")
    return table


def average_certified_radius(table: pd.DataFrame) -> float:
    """ACR: the mean over all images, abstentions and errors too, of correct * radius."""
    return float((table["correct"] * table["radius"]).mean())


def certified_accuracy(table: pd.DataFrame, radii) -> np.ndarray:
    """The share of all images that are correct with at least each of the radii: [len(radii)], in [0, 1]."""
    radius, correct = table["radius"].to_numpy(float), table["correct"].to_numpy(bool)
    return np.array([np.mean(correct & (radius >= r)) for r in radii])
