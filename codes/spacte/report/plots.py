"""Pictures from certification logs and from a training run's TensorBoard files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spacte.logs.certlog import certified_accuracy, certified_radius
from spacte.logs.description import printable
from spacte.report.labels import labels
from spacte.report.recount import label_probabilities
from spacte.report.run import Run
from spacte.utils import UserError

if TYPE_CHECKING:  # matplotlib and statsmodels take a second to import, which a table does not need
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")
# Okabe and Ito (2008): told apart by colour-blind readers; the line styles tell them apart in grey print, too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_POINTS = 600
_MOST_BANDS = 10  # of a picture
_HEIGHT, _LINE = 4.8, 0.18  # inches: of a figure with a short legend, of each further line of it
_LONGEST_OF_TWO = 48  # signs of a name that fits beside another


@contextlib.contextmanager
def _text_is_text() -> Iterator[None]:
    """A context in which matplotlib does not read a name with dollar signs as a formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


@_text_is_text()
def curves(rows: list[list[Run]]) -> Figure:
    """Certified accuracy over the radius, a line per row: a run, or the mean of an experiment's seeds.

    See `draw_curves` for the bands.
    """
    bands = "mean and range of the seeds" if not _are_single(rows) else "95 % interval over images"
    figure, axes = _figure(f"{_norm(rows)} radius", "certified accuracy")
    axes.set_title(", ".join([*_subject(rows), *([bands] if len(rows) <= _MOST_BANDS else [])]), fontsize=8, loc="left")
    draw_curves(axes, rows, labels(rows))
    _legend(figure)
    return figure


def draw_curves(axes: Axes, rows: list[list[Run]], names: list[str]) -> None:
    """A named line per row, in given axes: the mean over its runs.

    Where each has one run, the band is the pointwise 95 % Wilson interval over its images; otherwise it is the range of
    several runs, and one alone has none. Many rows have no bands, which would hide the lines. A sequential run tells of
    the radii that it decided: these are dots.
    """
    single = _are_single(rows)
    largest = max(float(certified_radius(run.log).max()) for runs in rows for run in runs)
    radii, highest = np.linspace(0, 1.02 * largest or 1.0, _POINTS), 0.0
    for number, (runs, label) in enumerate(zip(rows, map(_as_written, names), strict=True)):
        own, marker = radii, ""
        if not runs[0].knows_radii(radii).all():
            own, marker = runs[0].decided_radii[runs[0].decided_radii <= radii[-1]], "o"
            if not len(own):
                warnings.warn(f"'{label}' stopped early and decided no radius: it has no curve", stacklevel=2)
        each = np.stack([certified_accuracy(run.log, own) for run in runs])
        accuracy, low, high = each.mean(0), each.min(0), each.max(0)
        if single and len(own):
            from statsmodels.stats.proportion import proportion_confint

            images = len(runs[0].log)
            low, high = proportion_confint(np.rint(accuracy * images), images, method="wilson")
        shown = slice(int((accuracy > 0).sum()) + 1)  # the first 0 ends the line
        alpha = 0 if len(rows) > _MOST_BANDS else 0.15 if len(rows) <= 4 or not single else 0.07
        if marker:
            bars = [accuracy - low, high - accuracy]
            if alpha:
                axes.errorbar(own, accuracy, np.clip(bars, 0, None), color=_colour(number), linestyle="", linewidth=1)
        else:
            axes.fill_between(own[shown], low[shown], high[shown], color=_colour(number), alpha=alpha, linewidth=0)
        style = "" if marker else _style(number)
        axes.plot(
            own[shown],
            accuracy[shown],
            color=_colour(number),
            linestyle=style,
            marker=marker,
            markersize=4,
            label=label,
        )
        highest = max([highest, *high])
    axes.set(xlim=(0, radii[-1]), ylim=(0, min(1, np.ceil(10 * highest + 0.2) / 10)))


@_text_is_text()
def probabilities(rows: list[list[Run]]) -> Figure:
    """The distribution function of p: the share of images whose label has at most the probability p under noise.

    Of an experiment's seeds the mean. Unlike the ACR it does not depend on N and alpha. Source: Sun et al. (arXiv
    2410.06895), who compare training methods by it.
    """
    figure, axes = _figure("probability p of the image's label under noise", "share of images with at most p")
    points = np.linspace(0, 1, _POINTS)
    for number, (runs, label) in enumerate(zip(rows, _named(rows), strict=True)):
        each = [np.searchsorted(np.sort(p), points, side="right") / len(p) for p in map(label_probabilities, runs)]
        axes.step(
            points, np.mean(each, axis=0), where="post", color=_colour(number), linestyle=_style(number), label=label
        )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(", ".join(_subject(rows)), fontsize=8, loc="left")
    _legend(figure)
    return figure


@_text_is_text()
def histogram(runs: list[Run]) -> Figure:
    """How many images have which certified radius; abstained and wrong ones have none and are counted in the legend."""
    rows = [[run] for run in runs]
    figure, axes = _figure(f"certified {_norm(rows)} radius", "images")
    radii = [run.log["radius"][run.log["correct"] == 1] for run in runs]
    names = [f"{label}: {len(radius)} of {len(run.log)} right"
             for label, radius, run in zip(_named(rows), radii, runs, strict=True)]  # fmt: skip
    edges = np.linspace(0, max([float(radius.max()) for radius in radii if len(radius)] or [1.0]), 26)
    for number, (radius, name) in enumerate(zip(radii, names, strict=True)):
        colour = _colour(number)
        axes.hist(
            radius, edges.tolist(), histtype="step", color=colour, linestyle=_style(number), linewidth=1.5, label=name
        )
    axes.set(xlim=(0, edges[-1]))
    _legend(figure)
    return figure


def _named(rows: list[list[Run]]) -> list[str]:
    """The rows' labels; those of sequential runs say that their votes, or radii, are of draws that ended early."""
    names = zip(labels(rows), rows, strict=True)
    return [_as_written(f"{label}, stopped early" if some[0].stopping else label) for label, some in names]


def _as_written(label: str) -> str:
    """A label as matplotlib shows it, also where an underscore would hide it."""
    return "\u200b" * label.startswith("_") + label


def _are_single(rows: list[list[Run]]) -> bool:
    return all(len(runs) == 1 for runs in rows)


def _norm(rows: list[list[Run]]) -> str:
    return rows[0][0].norm.capitalize()


def _subject(rows: list[list[Run]]) -> list[str]:
    """What all rows are about, as far as it is one: the data set, the sigma."""
    runs = [run for some in rows for run in some]
    datasets = {run.dataset for run in runs}
    sigmas = {run.sigma and f"sigma {run.sigma:g}" for run in runs}
    return [one for some in (datasets, sigmas) if len(some) == 1 for one in some if one]


@_text_is_text()
def training(folder: Path) -> Figure:
    """A training run's figures over its epochs: losses, noisy accuracy, what else was logged, from TensorBoard files.

    Raises UserError if the folder holds none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # seconds to import

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    if not list(folder.glob("*tfevents*")):
        raise UserError(f"folder '{folder}' holds no TensorBoard files (events.out.tfevents...)")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a resumed run logs an epoch again is no news
    events.Reload()
    groups: dict[str, list[str]] = {}
    for tag in events.Tags()["scalars"]:
        group, name = tag.split("/", 1) if "/" in tag else ("run", tag)
        panel = group if group in ("loss", "accuracy") else name
        groups.setdefault(panel, []).append(tag)
    if not groups:
        raise UserError(f"the TensorBoard files in '{folder}' hold no figures")
    panels = sorted(groups, key=lambda panel: (panel not in ("loss", "accuracy"), panel))
    rows = -(-len(panels) // 2)
    figure = _new_figure(9, 3 * rows)
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        for number, tag in enumerate(sorted(groups[panel])):
            points = events.Scalars(tag)
            axes.plot([point.step for point in points], [point.value for point in points],
                      color=_colour(number), linestyle=_style(number), label=tag.split("/")[-1])  # fmt: skip
        axes.set(title=panel, xlabel="epoch")
        plain(axes)
        if len(groups[panel]) > 1:
            axes.legend(fontsize=7, ncols=2, frameon=False)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.suptitle(printable(folder.resolve().name), fontsize=10)
    return figure


def rendered(figure: Figure, path: Path) -> bytes:
    """The picture as bytes, in the format of the path's ending. Made in memory: no library meets a full disk."""
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:], dpi=200)
    return file.getvalue()


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = _new_figure(6.4, _HEIGHT)
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """A light grid, and no frame above and to the right."""
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """Below the axes, where a long name covers nothing; the figure grows by it."""
    names = figure.axes[0].get_legend_handles_labels()[1]
    columns = 2 if len(names) > 3 and max(map(len, names)) <= _LONGEST_OF_TWO else 1
    figure.set_figheight(_HEIGHT + _LINE * max(0, -(-len(names) // columns) - 3))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _style(number: int) -> str:
    return _STYLES[number % len(_STYLES)]
