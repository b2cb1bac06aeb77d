"""A certification log as a run of a report."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from spacte.logs.certlog import round_down
from spacte.logs.config import RunConfig, is_number
from spacte.logs.description import Description
from spacte.utils import UserError


@dataclass(frozen=True, kw_only=True)
class Run(Description):
    """A certification log and what is known of its classifier.

    `name` is the training run's name, made of its flags. `label` is what the user called it: the folders by which its
    log differs from the others' ("": none). `apart` is what else distinguishes it from runs that look alike. `method`
    are the folders that name the method where the defence is not known. The radii of `log` are in the run's norm.
    """

    name: str
    path: Path
    log: pd.DataFrame
    label: str = ""
    apart: str = ""
    method: str = ""

    @property
    def title(self) -> str:
        """What the user called it, or else its name, and what tells it apart."""
        return f"{self.label or self.name} ({self.apart})" if self.apart else self.label or self.name

    @property
    def experiment_key(self) -> tuple:
        """Its name and what is known of the classifier: equal for the seeds of one experiment."""
        return (self.name, self.method, *self.facts.values())

    @property
    def required_config(self) -> RunConfig:
        """The configuration beside the log. UserError if there is none."""
        if self.config is None:
            raise UserError(f"no configuration lies beside '{self.path}'")
        return self.config

    @property
    def variant(self) -> tuple[str, ...]:
        """What a checkpoint's training did otherwise than the paper: "no teaching", "no cosine", "5 teachers", ..."""
        words = []
        for one in self.training:
            words.append({"none": "no teaching", "self": "paced by self"}.get(str(one.get("paced_by"))))
            words.append(f"pace share {one['pace_share']}" if one.get("pace_share") is not None else None)
            words.append(f"{len(one['teachers'])} teachers" if one.get("teachers") else None)
            flags = ("whole_gradient", "frozen_trunk", "no_cosine")
            words += [name.replace("_", " ") for name in flags if one.get(name)]
            sigma = one.get("noise_sd")
            words.append(f"trained at sigma {sigma:g}" if is_number(sigma) and sigma != self.sigma else None)
        return tuple(dict.fromkeys(filter(None, words)))

    @property
    def decided_radii(self) -> np.ndarray:
        """The radii, in its norm, that a sequential run's stopping rule decided one by one; of others none."""
        stopping = self.config.sequential if self.config else None
        if stopping is None or not stopping.decides or stopping.radii is None:
            return np.empty(0)
        return np.array(sorted(stopping.radii)) * self.per_l2

    def in_norm(self, norm: str) -> "Run":
        """The run, of L2 radii, in another norm. UserError if its dimension is needed and not known."""
        run = replace(self, norm=norm)
        try:
            return replace(run, log=run.rescaled(self.log))
        except UserError as error:
            raise UserError(f"'{self.path}': {error}") from error

    def rescaled(self, log: pd.DataFrame) -> pd.DataFrame:
        """A log of L2 radii with the radii that they are worth in the run's norm, rounded down."""
        if self.per_l2 == 1.0:
            return log
        return log.assign(radius=[float(round_down(radius * self.per_l2)) for radius in log["radius"]])
