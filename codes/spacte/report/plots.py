"""Pictures from certification logs and from a training run's TensorBoard files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spacte.logs.certlog import certified_accuracy, certified_radius
from spacte.logs.described import printable
from spacte.report.labels import labels
from spacte.report.recount import label_probabilities
from spacte.report.run import Run
from spacte.utils import UserError, check_ending, replace_file

if TYPE_CHECKING:  # matplotlib and statsmodels take a second to import, which a table does not need
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")
# Okabe and Ito (2008): told apart by colour-blind readers; the line styles tell them apart in grey print, too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_POINTS = 600


def curves(runs: list[Run]) -> Figure:
    """Certified accuracy over the radius, a line per run, with pointwise 95 % Wilson intervals over its images."""
    figure, axes = _figure("L2 radius", "certified accuracy, 95 % interval over images")
    draw_curves(axes, [[run] for run in runs], labels(runs))
    _legend(figure)
    return figure


def draw_curves(axes: Axes, experiments: list[list[Run]], names: list[str]) -> None:
    """A named line per experiment, in given axes: the mean over its runs.

    Where each has one run, the band is the pointwise 95 % Wilson interval over its images; otherwise it is the range of
    several runs, and one alone has none.
    """
    single = all(len(runs) == 1 for runs in experiments)
    largest = max(float(certified_radius(run.log).max()) for runs in experiments for run in runs)
    radii = np.linspace(0, 1.02 * largest or 1.0, _POINTS)
    for number, (runs, label) in enumerate(zip(experiments, names, strict=True)):
        each = np.stack([certified_accuracy(run.log, radii) for run in runs])
        accuracy, low, high = each.mean(0), each.min(0), each.max(0)
        if single:
            from statsmodels.stats.proportion import proportion_confint

            images = len(runs[0].log)
            low, high = proportion_confint(np.rint(accuracy * images), images, method="wilson")
        shown = slice(int((accuracy > 0).sum()) + 1)  # the first 0 ends the line
        alpha = 0.15 if len(experiments) <= 4 else 0.07
        axes.fill_between(radii[shown], low[shown], high[shown], color=_colour(number), alpha=alpha, linewidth=0)
        axes.plot(radii[shown], accuracy[shown], color=_colour(number), linestyle=_style(number), label=label)
    axes.set(xlim=(0, radii[-1]), ylim=(0, 1))


def probabilities(runs: list[Run]) -> Figure:
    """The distribution of p: the share of images whose class has a probability of more than p under noise.

    Unlike the ACR it does not depend on N and alpha. Source: Sun et al. (arXiv 2410.06895), who argue for the
    distribution function of p_A, of which this is 1 minus it.
    """
    figure, axes = _figure("probability p of the image's class under noise", "share of images above p")
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        p = np.sort(label_probabilities(run))
        above = 1 - np.arange(1, len(p) + 1) / len(p)
        axes.step(
            [0, *p, 1], [1, *above, 0], where="post", color=_colour(number), linestyle=_style(number), label=label
        )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    _legend(figure)
    return figure


def histogram(runs: list[Run]) -> Figure:
    """How many images have which certified radius; abstained and wrong ones have none and are counted in the legend."""
    figure, axes = _figure("certified L2 radius", "images")
    radii = [run.log["radius"][run.log["correct"] == 1] for run in runs]
    names = [f"{label}: {len(radius)} of {len(run.log)} right"
             for label, radius, run in zip(labels(runs), radii, runs, strict=True)]  # fmt: skip
    edges = np.linspace(0, max([float(radius.max()) for radius in radii if len(radius)] or [1.0]), 26)
    for number, (radius, name) in enumerate(zip(radii, names, strict=True)):
        colour = _colour(number)
        axes.hist(
            radius, edges.tolist(), histtype="step", color=colour, linestyle=_style(number), linewidth=1.5, label=name
        )
    axes.set(xlim=(0, edges[-1]))
    _legend(figure)
    return figure


def training(folder: Path) -> Figure:
    """A training run's figures over its epochs: losses, noisy accuracy, what else was logged, from TensorBoard files.

    Raises UserError where the folder holds none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # seconds to import

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    if not list(folder.glob("*tfevents*")):
        raise UserError(f"folder '{folder}' holds no TensorBoard files (events.out.tfevents...)")
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
        _plain(axes)
        if len(groups[panel]) > 1:
            axes.legend(fontsize=7, ncols=2, frameon=False)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.suptitle(printable(folder.resolve().name), fontsize=10)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format that the path's ending names. Raises UserError where it cannot be written."""
    check_ending(path, ENDINGS)
    replace_file(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=200))


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = _new_figure(6.4, 4.8)
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """Below the axes, where a long name covers nothing."""
    figure.legend(loc="outside lower center", ncols=2 if len(figure.axes[0].get_legend_handles_labels()[1]) > 3 else 1,
                  fontsize=8, frameon=False)  # fmt: skip


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _style(number: int) -> str:
    return _STYLES[number % len(_STYLES)]
