"""Certified accuracy class by class: which classes a classifier gives up in favour of the others."""

import numpy as np
import pandas as pd

from spacte.logs.certlog import certified_at
from spacte.logs.description import DESCRIPTION
from spacte.report.comparable import rows_of
from spacte.report.labels import labels
from spacte.report.run import Run
from spacte.utils import listed

_FEWEST_IMAGES = 10  # to call a class given up: with a quarter of them right, 0 of 10 would have probability .06
_MOST_NAMED = 5


def table(runs: list[Run], radius: float, over_seeds: bool = False) -> pd.DataFrame:
    """Two rows for each run, or for the seeds of each experiment (their means): at radius 0 and at `radius`.

    Columns: what the run is, the radius, mean (certified accuracy over all images), smallest (that of the worst class),
    then each class's, titled with its label. A sequential run tells only of the radii that it decided.
    """
    rows = []
    for name, some in rows_of(runs, over_seeds):
        for at in dict.fromkeys((0.0, radius)):
            (known,) = some[0].knows_radii([at])
            mean = np.mean([certified_at(run.log, [at])[0].mean() for run in some]) if known else np.nan
            classes = pd.concat([_by_class(run, at) for run in some], axis=1).mean(axis=1).sort_index()
            classes = classes if known else classes * np.nan
            row = some[0].facts | {"stopping": some[0].stopping, "radius": at}
            row |= {"mean": float(mean), "smallest": float(classes.min())}
            row |= {str(label): float(share) for label, share in classes.items()}
            rows.append(row | {"run": name})
    classes = sorted({int(name) for row in rows for name in row if name.isdecimal()})
    columns = [*DESCRIPTION, "stopping", "radius", "mean", "smallest", *map(str, classes), "run"]
    return pd.DataFrame(rows, columns=columns)


def _by_class(run: Run, radius: float) -> pd.Series:
    """The certified accuracy of each class that the log has images of, by label."""
    return pd.Series(certified_at(run.log, [radius])[0].astype(float)).groupby(run.log["label"].to_numpy()).mean()


def _named(class_labels: list[int], images: dict[int, int]) -> str:
    named = listed(
        (f"{label} ({images[label]} image{'s' * (images[label] > 1)})" for label in class_labels), _MOST_NAMED
    )
    return f"{'class' if len(class_labels) == 1 else 'classes'} {named}"


def given_up(runs: list[Run]) -> list[str]:
    """A line for each run in which a class is given up: none of its images, ten or more, is right at radius 0.

    There it also names the classes of fewer images of which none is right, which may be chance.
    """
    lines = []
    for run, name in zip(runs, labels([[run] for run in runs]), strict=True):
        shares, images = _by_class(run, 0.0), run.log["label"].value_counts().to_dict()
        known = run.knows_radii([0.0]).all()
        none_right = [label for label, share in shares.items() if known and share == 0]
        gone = [label for label in none_right if images[label] >= _FEWEST_IMAGES]
        few = [label for label in none_right if label not in gone]
        if gone:
            line = f"'{name}' gives up {_named(gone, images)}: none is right even at radius 0"
            lines.append(line + f"; nor of {_named(few, images)}, which may be chance" * bool(few))
    return lines
