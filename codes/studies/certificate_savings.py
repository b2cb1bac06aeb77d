"""What stopping early and what all the votes save in draws, by simulation from the vote counts of runs.

    python codes/studies/certificate_savings.py LOG... [--N 100000] [--seed 0]

The class probabilities of each image are the shares of its votes in a run of fixed N. From them N0 selection and up to
N estimation votes are drawn again: for each certificate with a fixed N, and under the rule that `certify_mhead.py
--sequential` uses for the table of radii (0, 0.25, ... that N draws can reach). `draws` is the mean number of
estimation draws per image as a share of N, `accuracy` the certified accuracy averaged over the radii, and `N alike` the
share of N at which the certificate from all the votes reaches what Cohen's reaches at N. All are means of 20
simulations: in single ones `N alike` varies by a third.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from spacte import cli
from spacte.logs.certified import certificate_of, largest_radius
from spacte.logs.config import RANKED, RunConfig
from spacte.logs.plans import stopping_rule, table_stopping
from spacte.logs.table import markdown, table_radii
from spacte.report.reading import read_runs
from spacte.report.recount import votes_of
from spacte.report.run import Run
from spacte.smooth.certificates import CERTIFICATES, Certificate
from spacte.smooth.draws import portion
from spacte.utils import UserError

_SIMULATIONS = 20


def _main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs with their counts, or folders of them")
    parser.add_argument("--N", type=cli.positive_int, help="draws (default: as in each log)")
    parser.add_argument("--batch_size", type=cli.positive_int, default=1000, help="noisy images per forward pass")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the simulated draws")
    args = parser.parse_args()
    rows = []
    for run in read_runs(args.logs):
        votes = votes_of(run)
        if votes is None:
            raise UserError(f"'{run.path}' has no vote counts beside it: nothing can be simulated from it")
        if run.required_config.lacks(RANKED):
            raise UserError(f"the configuration beside '{run.path}' does not say how many votes select a class")
        if run.required_config.sequential:
            raise UserError(f"'{run.path}' stopped early: the votes of a fixed N are needed")
        if not all(one.sum() for one in votes):
            raise UserError(f"'{run.path}' has images without estimation votes (--skip_wrong): all are needed")
        probabilities = np.stack([one / one.sum() for one in votes])
        rows += _simulated(run, probabilities, args.N or run.required_config.N, args.batch_size, args.seed)
    print(markdown(pd.DataFrame(rows)))


def _simulated(run: Run, probabilities: np.ndarray, n: int, batch_size: int, seed: int) -> list[dict]:
    """A row for each certificate with a fixed N and one for each that stops early."""
    labels = run.log["label"].to_numpy()
    alpha, sigma, n0 = certificate_of(run.required_config).alpha, run.required_config.noise_sd, run.required_config.N0
    limit = largest_radius(replace(run.required_config, N=n, certificate="cohen", sequential=None))
    radii, rows, reached = table_radii(limit, run.dataset), [], {}
    for kind in CERTIFICATES:
        fixed = Certificate(alpha, sigma, False, kind)
        reached[kind] = _fixed(fixed, probabilities, labels, n0, n, radii, seed)
        rows.append({"run": run.name, "certificate": kind, "draws": 1.0, "accuracy": reached[kind]})
        config = replace(run.required_config, N=n, certificate=kind)
        config = replace(config, sequential=table_stopping(config))
        draws, accuracy = _early(config, probabilities, labels, batch_size, radii, seed)
        rows.append({"run": run.name, "certificate": f"{kind}, sequential", "draws": draws, "accuracy": accuracy})
    ours = Certificate(alpha, sigma, False, "all-votes")
    enough = (
        share
        for share in np.geomspace(0.01, 1, 81)
        if _fixed(ours, probabilities, labels, n0, max(1, round(share * n)), radii, seed) >= reached["cohen"]
    )
    rows[2]["N alike"] = next(enough, math.nan)
    return rows


def _fixed(certificate, probabilities, labels, n0: int, n: int, radii, seed: int) -> float:
    """Certified accuracy, averaged over the radii and simulations, with n0 selection and n estimation draws."""
    rng, hits = np.random.default_rng(seed), 0.0
    for p, label in zip(probabilities, labels, strict=True):
        selections, estimations = rng.multinomial(n0, p, _SIMULATIONS), rng.multinomial(n, p, _SIMULATIONS)
        for selection, estimation in zip(selections, estimations, strict=True):
            hits += _hits(certificate, selection, estimation, label, radii)
    return hits / len(labels) / _SIMULATIONS


def _early(config: RunConfig, probabilities, labels, batch_size: int, radii, seed: int) -> tuple[float, float]:
    """Draws an image as a share of N, and certified accuracy, where a rule may stop them."""
    rng, hits, used, n = np.random.default_rng(seed), 0.0, 0, config.N
    certificate, rule = certificate_of(config), stopping_rule(config)
    for p, label in [*zip(probabilities, labels, strict=True)] * _SIMULATIONS:
        selection, estimation = rng.multinomial(config.N0, p), np.zeros(len(p), dtype=int)
        while estimation.sum() < n:
            estimation += rng.multinomial(portion(int(estimation.sum()), n, batch_size, looks=True), p)
            if rule(selection, estimation):
                break
        used += estimation.sum()
        hits += _hits(certificate, selection, estimation, label, radii)
    return used / n / len(labels) / _SIMULATIONS, hits / len(labels) / _SIMULATIONS


def _hits(certificate, selection, estimation, label: int, radii) -> float:
    """The share of the radii at which the image is certified and right."""
    predict, radius = certificate(selection, estimation)
    return float((radius >= radii).mean()) if predict == label else 0.0


if __name__ == "__main__":
    cli.run(_main)
