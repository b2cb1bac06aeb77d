"""What sequential certification would have saved on certification logs of a fixed N, by simulation.

    python codes/studies/sequential_savings.py LOG...

Each image's p_A is read off its radius (the votes that give that radius at N; 1/2 where it abstained), and its votes
are drawn from that p_A under the rule that `certify_mhead.py --sequential` uses: once for the whole table of radii (0,
0.25, ... below 3.5 sigma) and once for the single radius 1.5 sigma, each in 20 simulated runs. `mean off` is the
largest change, at any of these radii, of the certified accuracy averaged over the 20 runs, `single off` the largest
change in any single run; both in points. N and alpha are what the JSON beside a log says, or else 100,000 and 0.001.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from spacte import cli
from spacte.logs.certlog import certified_accuracy, read_table
from spacte.logs.config import RunConfig
from spacte.logs.description import description
from spacte.logs.runfiles import RunFiles
from spacte.logs.table import RADIUS_STEP, markdown
from spacte.smooth.bounds import anytime_lower_bound, radius_of
from spacte.smooth.certificates import ABSTAIN
from spacte.smooth.draws import portion
from spacte.smooth.stopping import GIVE_UP, RadiiDecided
from spacte.utils import UserError

_REPEATS = 20  # simulated runs per log


def _main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs; a folder noise-<sd> tells sigma")
    parser.add_argument("--batch_size", type=cli.positive_int, default=1000, help="noisy images per forward pass")
    parser.add_argument("--give_up", type=cli.open_probability, default=GIVE_UP, help="as of certify_mhead.py")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="of the simulated draws")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(args.seed), []
    for path in args.logs:
        log, sigma, (n, alpha) = read_table(path), description(path).sigma, _draws(path)
        if sigma is None:
            raise UserError(f"'{path}' lies in no folder noise-<sd>: its sigma is not known")
        table = np.arange(0, 3.5 * sigma, RADIUS_STEP)
        row = {"log": f"{path.parts[0] if len(path.parts) == 1 else '/'.join(path.parts[-4:-1])}"}
        for name, radii in (("table", table), ("1.5 sigma", np.array([1.5 * sigma]))):
            used, changes = _simulate(log, sigma, radii, n, alpha, args, rng)
            row[f"{name}: draws"] = used / n
            row[f"{name}: mean off"] = 100 * np.abs(changes.mean(axis=0)).max()
            row[f"{name}: single off"] = 100 * np.abs(changes).max()
        rows.append(row)
    result = pd.DataFrame(rows)
    print(markdown(result))
    for name in ("table", "1.5 sigma"):
        draws, mean, single = (result[f"{name}: {figure}"] for figure in ("draws", "mean off", "single off"))
        runs = f"in any of {_REPEATS * len(result)} runs {single.max():.2f}"
        print(f"{name}: mean draws N/{1 / draws.mean():.1f}, off by at most {mean.max():.2f} points, {runs}")


def _draws(path: Path) -> tuple[int, float]:
    """N and alpha of a log: what the JSON beside it says, or else the defaults'. UserError if N was not fixed."""
    files = RunFiles(path)
    config = files.read_json().config if files.json.exists() else RunConfig(N=100_000, alpha=0.001)
    unknown = [name for name in config.lacking if name in ("N", "alpha") or name in config.unknown]
    if unknown:
        raise UserError(f"'{files.json}': {', '.join(unknown)} missing or wrong: what was drawn is not known")
    if config.sequential or config.certificate != "cohen" or config.top_k is not None:
        raise UserError(f"'{path}': what is simulated are logs of a fixed N with Cohen's certificate")
    return config.N, config.alpha


def _simulate(
    log: pd.DataFrame, sigma: float, radii: np.ndarray, most: int, alpha: float, args, rng
) -> tuple[float, np.ndarray]:
    """Mean draws per image, and each run's change of certified accuracy at the radii: [_REPEATS, radii]."""
    p = np.tile(_probabilities(log, sigma, most, alpha), _REPEATS)
    rule = RadiiDecided(radii, most, alpha, sigma, args.give_up)
    votes, used = np.zeros(len(p), dtype=int), np.zeros(len(p), dtype=int)
    active, n = np.arange(len(p)), 0
    while n < most:
        size = portion(n, most, args.batch_size, looks=True)
        votes[active] += rng.binomial(size, p[active])
        n += size
        used[active] = n
        active = active[~rule.enough(votes[active], n)]
    bounds = anytime_lower_bound(votes, used, alpha)
    radius = np.array([radius_of(bound, sigma) or 0.0 for bound in bounds])
    correct = np.tile(log["correct"] == 1, _REPEATS) & (bounds >= 0.5)
    changes = []
    for run in np.split(np.arange(len(p)), _REPEATS):
        simulated = log.assign(radius=radius[run], correct=correct[run])
        # a bound that the rule took for reached may miss its radius by a rounding error
        changes.append(certified_accuracy(simulated, radii - 1e-9) - certified_accuracy(log, radii))
    return used.mean(), np.array(changes)


def _probabilities(log: pd.DataFrame, sigma: float, n: int, alpha: float) -> np.ndarray:
    """The observed rate n_A / n that gave each radius, 1/2 where the image abstained."""
    votes = np.arange(n // 2, n + 1)
    radii = sigma * stats.norm.ppf(stats.beta.ppf(alpha, votes, n - votes + 1))
    above = np.searchsorted(radii, log["radius"]).clip(1, len(radii) - 1)
    nearest = votes[above - (log["radius"] - radii[above - 1] <= radii[above] - log["radius"])]
    return np.where(log["predict"] == ABSTAIN, 0.5, nearest / n)


if __name__ == "__main__":
    cli.run(_main)
