"""The vote counts of a certification: one JSON line an image, from which any certificate follows without a network."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from spacte.certlog import COLUMNS, format_row, round_down
from spacte.core_mhead import certificate
from spacte.utils import UserError


@dataclass(frozen=True)
class Votes:
    """What was counted on one image: `selection` and `estimation` [V, K], the heads' rows and last the ensemble's."""

    idx: int
    label: int
    seconds: float
    selection: Tensor
    estimation: Tensor

    def to_line(self) -> str:
        """One JSON line; a voter's counts are {class: votes} without the zeros."""
        fields = {"idx": self.idx, "label": self.label, "seconds": round(self.seconds, 6)}
        fields["classes"] = self.selection.shape[1]
        for name in ("selection", "estimation"):
            fields[name] = [{k: n for k, n in enumerate(row) if n} for row in getattr(self, name).tolist()]
        return json.dumps(fields) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Votes":
        """The inverse of `to_line`."""
        fields = json.loads(line)
        tables = {}
        for name in ("selection", "estimation"):
            tables[name] = torch.zeros(len(fields[name]), fields["classes"], dtype=torch.int64)
            for voter, votes in enumerate(fields[name]):
                for k, n in votes.items():
                    tables[name][voter, int(k)] = n
        return cls(fields["idx"], fields["label"], fields["seconds"], **tables)

    def certificate(self, alpha: float, sigma: float, voter: int = -1) -> tuple[int, float]:
        """(class, radius) of one voter, the ensemble by default; see core_mhead.Smooth.certify for the guarantee."""
        return certificate(self.selection[voter], self.estimation[voter], alpha, sigma)

    def log_row(self, alpha: float, sigma: float, voter: int = -1) -> str:
        """The image's line in a certification log."""
        predict, radius = self.certificate(alpha, sigma, voter)
        return format_row(self.idx, self.label, predict, radius, self.seconds)


def read_votes(path: Path) -> list[Votes]:
    """Every image of a counts file, in its order. Raises UserError that names the line which is no vote count."""
    votes = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read vote counts '{path}': {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            votes.append(Votes.from_line(line))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"'{path}', line {number}: no vote count") from error
    return votes


def log_table(votes: list[Votes], alpha: float, sigma: float, voter: int = -1) -> pd.DataFrame:
    """The log of one voter as a table, with the radii as a log would hold them."""
    rows = []
    for one in votes:
        predict, radius = one.certificate(alpha, sigma, voter)
        rows.append((one.idx, one.label, predict, float(round_down(radius)), int(predict == one.label), one.seconds))
    return pd.DataFrame(rows, columns=list(COLUMNS))
