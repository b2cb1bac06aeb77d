"""README's picture: one network with several heads beside what certification logs say of it.

python codes/studies/overview.py LOG... --output overview.svg

Runs that differ by their seed alone are one line, their mean, with a band from the smallest to the largest. In the
README: the logs in logs_certification/cifar10/0Gaussian/{1-head,5-heads,5-networks}.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from spacte import cli
from spacte.files import check_ending, replace_file
from spacte.report import plots
from spacte.report.comparable import rows_of
from spacte.report.reading import read_runs

_HEADS = 5


def _main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="certification logs, or folders of them")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=", ".join(plots.ENDINGS))
    args = parser.parse_args()
    check_ending(args.output, plots.ENDINGS)
    groups = [some for _, some in rows_of(read_runs(args.logs), over_seeds=True)]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_architecture(left)
    names = [
        f"{some[0].heads.in_words if some[0].heads else 'unknown heads'}{f', {len(some)} seeds' * (len(some) > 1)}"
        for some in groups
    ]
    plots.draw_curves(right, groups, names)
    first = groups[0][0]
    sigma = [] if first.sigma is None else [f"sigma {first.sigma:g}"]
    title = ", ".join(filter(None, [first.dataset, first.arch, *sigma]))
    right.set(xlabel="L2 radius", ylabel="certified accuracy", title=title)
    plots.plain(right)
    right.legend(fontsize=8, frameon=False)
    replace_file(args.output, plots.rendered(figure, args.output))
    print(f"wrote {args.output}")


def _draw_architecture(axes) -> None:
    """Noisy copies -> trunk -> heads in a ring -> summed logits -> votes -> radius."""
    axes.set(xlim=(-0.1, 11.2), ylim=(0, 6))
    axes.axis("off")
    _box(axes, 0.0, 2.3, 1.7, 1.4, "image\n+ Gaussian\nnoise", "#ffffff")
    _box(axes, 2.2, 2.0, 1.4, 2.0, "trunk\n(shared\nstages)", "#cfe2f3")
    heights = [5.0 - 1.1 * h for h in range(_HEADS)]
    for h, y in enumerate(heights):
        _box(axes, 5.2, y - 0.38, 1.4, 0.76, f"head {h}", "#fde5cd")
        _arrow(axes, (3.6, 3.0), (5.2, y))
        _arrow(axes, (6.6, y), (7.45, 3.0))
        if h:  # head h - 1 teaches head h
            _arrow(axes, (5.9, heights[h - 1] - 0.38), (5.9, y + 0.38), "#D55E00")
    _arrow(axes, (5.2, heights[-1] - 0.2), (5.2, heights[0] + 0.2), "#D55E00", "arc3,rad=-0.3")
    _box(axes, 7.45, 2.55, 0.9, 0.9, "sum", "#ffffff")
    _box(axes, 8.95, 2.3, 1.6, 1.4, "votes\n→ class,\nradius", "#d9ead3")
    _arrow(axes, (1.7, 3.0), (2.2, 3.0))
    _arrow(axes, (8.35, 3.0), (8.95, 3.0))
    axes.text(5.9, 5.72, "teaching in a ring (training only)", color="#D55E00", ha="center", fontsize=9)


def _box(axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=colour, edgecolor="#333333", linewidth=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def _arrow(axes, start, end, colour: str = "#333333", connection: str = "arc3") -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, connectionstyle=connection, **style))


if __name__ == "__main__":
    cli.run(_main)
