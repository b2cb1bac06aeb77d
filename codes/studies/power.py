"""Before a run: how many images and draws an interval of the wanted width takes, and what they cost.

    python codes/studies/power.py --width 0.02 A.log B.log         # of the difference of two ACRs, from a pilot of both
    python codes/studies/power.py --width 0.02 A.log               # of one ACR
    python codes/studies/power.py --width 0.02 --deviation 0.25    # from a guess of the deviation over images
    python codes/studies/power.py --width 0.02 --deviation 0.25 A.log    # and its cost at the log's speed

The width is that of the whole 95 % interval over images, from its lower to its upper end. To find a difference of D in
four of five studies, take a width of 1.4 D: with 2 D the interval leaves 0 out only every other time.

A pilot needs its vote counts beside the log. For each number of draws N its votes are drawn again from the shares that
it counted, and certified; the deviation over images is that of the radii, or of their differences image by image, less
what the pilot's own draws contributed. A line says how far the pilot's own images leave the number of images open.
There are never fewer images than report.py needs for an interval: 50 on which two runs differ, by the pilot's share of
these. More draws make radii larger, and the spread with them: what makes an interval narrow is images. So choose N by
the radii that matter (`largest radius`), then read the images off its row. The seeds of a training vary, too, which no
image can tell: see report.py --compare with two folders. The time is that of one certification of each log.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from spacte import cli
from spacte.logs.certified import largest_radius, log_table
from spacte.logs.certlog import certified_radius
from spacte.logs.counts import VoteCounts
from spacte.logs.table import markdown
from spacte.report.comparable import check_pair, check_same_images
from spacte.report.intervals import FEWEST_DIFFERENT, differ
from spacte.report.reading import read_runs
from spacte.report.recount import needed_counts
from spacte.report.run import Run
from spacte.utils import UserError

_DRAWS = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_MOST_IMAGES = 10**9
_FEWEST_IMAGES = 50  # of a pilot, whose deviation then has an interval that misses in about a tenth of cases
_DRAWN_AGAIN = 5000  # radii of a pilot for each N, so that their own draws no longer count


def _main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("logs", nargs="*", type=Path, metavar="LOG", help="one pilot, or two whose difference is to be measured")
    add("--width", type=cli.positive_float, required=True, help="of the 95 %% interval, in units of the ACR")
    add("--deviation", type=cli.positive_float, metavar="SD", help="over images, in place of the pilot's")
    add(
        "--N",
        nargs="+",
        type=cli.positive_int,
        metavar="N",
        help=f"draws to choose from ({', '.join(map(str, _DRAWS))})",
    )
    add("--seed", type=cli.seed, default=0, help="of the votes that are drawn again")
    args = parser.parse_args()
    if len(args.logs) > 2 or not (args.logs or args.deviation):
        raise UserError("give one log, two logs, or --deviation")
    runs = [run for path in args.logs for run in read_runs([path])]
    if len(runs) != len(args.logs):
        raise UserError("give logs, one or two, and no folders of several")
    check_same_images(runs)
    if len(runs) == 2:
        check_pair(*runs)
    draws = sorted(set(args.N or _DRAWS))
    table = plan(runs, args.width, draws, args.deviation, args.seed)
    times = [_time(seconds) for seconds in table.pop("seconds")]
    error, images = table.pop("error").max(), table.pop("shared").max()
    print(markdown(table.assign(time=times).dropna(axis=1, how="all")))
    if args.deviation is None:
        open_to = f"leave that number open to within {100 * error:.0f} % (95 %)"
        if images < _FEWEST_IMAGES:
            open_to = "are too few to say how far they leave that number open"
        of = f"the pilot's {images} images" if len(runs) == 1 else f"the {images} images that the pilots share"
        print(f"\nHow many images are needed follows from {of}, which {open_to}.")


def _time(seconds: float) -> str | None:
    if math.isnan(seconds):
        return None
    return str(timedelta(seconds=round(seconds))) if seconds < timedelta.max.total_seconds() else "more than 10^9 days"


def plan(runs: list[Run], width: float, draws: list[int], deviation: float | None, seed: int = 0) -> pd.DataFrame:
    """A row for each number of draws N: largest radius, deviation over images, images for the width, draws, seconds,
    the `error` of the number of images, as a share of it, that the pilots' own images leave, and the number `shared`.

    At least as many images as report.py gives an interval for: of the pilots' images only some differ.

    The draws in all are those of each log, selection included; an image that --skip_wrong leaves out takes no others.
    Without a log the selection's 100 are added, and the seconds are not known (NaN).
    """
    rng, rows = np.random.default_rng(seed), []
    pilots = [_Pilot.of(run) for run in runs]
    shared = sorted(set.intersection(*(set(pilot.idx) for pilot in pilots))) if pilots else []
    if pilots and len(shared) < 2:
        raise UserError("a pilot must have at least 2 images, and two pilots must share them")
    for n in draws:
        spread, share, error = _spread(pilots, n, shared, rng) if pilots else (0.0, 1.0, 0.0)
        if deviation is not None:
            spread = deviation
        elif spread == 0:
            said = f"as far as its {len(shared)} images tell: give --deviation"
            raise UserError(f"the pilot's radii vary no more than its draws explain, {said}")
        images = _images(spread, width, math.ceil(FEWEST_DIFFERENT / (share or 1.0)))
        of_each = [pilot.draws(n) for pilot in pilots] or [100.0 + n]
        seconds = sum(pilot.draws(n) * pilot.seconds_per_draw for pilot in pilots) * images if pilots else math.nan
        limit = min((largest_radius(replace(run.required_config, N=n)) for run in runs), default=math.nan)
        needed = {"images": images, "draws in all": round(images * max(of_each)), "seconds": seconds}
        told = {"error": error, "shared": len(shared)}
        rows.append({"N": n, "largest radius": limit, "deviation": spread} | needed | told)
    return pd.DataFrame(rows)


def _images(spread: float, width: float, fewest: int) -> int:
    """How many make Student's 95 % interval that wide."""
    images = (2 * stats.norm.ppf(0.975) * spread / width) ** 2
    if images > _MOST_IMAGES:
        raise UserError(f"--width {width:g}: no data set has the {images:.2g} images that it needs")
    quantile = stats.t.ppf(0.975, max(math.ceil(images), fewest) - 1)
    return max(fewest, math.ceil((2 * quantile * spread / width) ** 2))


def _spread(pilots: list["_Pilot"], n: int, idx: list[int], rng) -> tuple[float, float, float]:
    """Of what n draws would measure: its standard deviation over images, the share of images on which it is not 0, and
    the half width of a 95 % interval of its variance, over the pilot's images, as a share of that variance.

    Votes drawn again from a pilot's shares vary by the images, by the pilot's own draws and by these new draws. The
    variance of the pilot's own draws is estimated from pairs of such sets at the pilot's N, and subtracted.
    """
    times = max(2, math.ceil(_DRAWN_AGAIN / len(idx)))

    def measured(at: list[int]) -> np.ndarray:
        radii = [pilot.radii(draws, idx, rng) for pilot, draws in zip(pilots, at, strict=True)]
        return radii[0] - (radii[1] if len(radii) > 1 else 0)

    own = [pilot.run.required_config.N for pilot in pilots]
    of_draws = np.stack([(measured(own) - measured(own)) ** 2 for _ in range(times)]) / 2  # [times, images]
    found = np.stack([measured([n] * len(pilots)) for _ in range(times)])
    squares = (found - found.mean(axis=1, keepdims=True)) ** 2 * len(idx) / (len(idx) - 1) - of_draws
    variance, drawn = squares.mean(), squares.mean(axis=1).std(ddof=1) / math.sqrt(times)
    if variance <= 3 * drawn:  # draws explain it
        return 0.0, float(differ(found).mean()), math.nan
    error = stats.norm.ppf(0.975) * squares.mean(axis=0).std(ddof=1) / math.sqrt(len(idx)) / variance
    return math.sqrt(variance), float(differ(found).mean()), error


class _Pilot:
    """A run's votes, from which those of another number of draws are drawn."""

    def __init__(self, run: Run, counts: list[VoteCounts]):
        self.run, self.counts = run, counts
        self.idx = [one.idx for one in counts]
        self.drawn = np.array([one.estimation.any() for one in counts])
        self.selection = int(counts[0].selection[-1].sum())
        used = sum(one.draws for one in counts)
        self.seconds_per_draw = sum(one.seconds for one in counts) / used

    @classmethod
    def of(cls, run: Run) -> "_Pilot":
        """UserError if no counts, or not of a fixed N, lie beside the log."""
        counts = needed_counts(run, "give --deviation alone")
        if run.required_config.sequential:
            raise UserError(f"'{run.path}' stopped early (--sequential): a pilot has a fixed N")
        return cls(run, counts)

    def draws(self, n: int) -> float:
        """The mean draws per image at N draws."""
        return self.selection + n * float(self.drawn.mean())

    def radii(self, n: int, idx: list[int], rng) -> np.ndarray:
        """Certified radii of the images `idx` from n votes drawn again; 0 where none were counted."""
        of_idx, again = {one.idx: one for one in self.counts}, []
        for one in (of_idx[number] for number in idx):
            total = one.estimation.sum(-1, keepdims=True)
            votes = rng.multinomial(n, one.estimation / np.maximum(total, 1)) if total.any() else one.estimation
            again.append(replace(one, estimation=votes))
        drawn = np.array([one.estimation.any() for one in again])
        return certified_radius(log_table(again, replace(self.run.required_config, N=n))) * drawn


if __name__ == "__main__":
    cli.run(_main)
