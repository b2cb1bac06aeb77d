"""Which rule makes the most of the votes: why the certificate from all votes is what it is.

    python codes/studies/compare_certificates.py [COUNTS.jsonl... --alpha 0.001]    # simulated votes, and runs'

Each row is a rule for a certificate from all the votes, each column what the votes are of: K classes and N draws, drawn
from simulated class probabilities, or a run's counts; every column simulates other images. A figure is the average
certified radius in units of sigma, in which wrong images count 0; `smaller` is the share of images whose radius is
smaller than Cohen's, `worst` by how much at most. All rules bound p_A from below by L and the strongest other class
from above by U, radius (Phi^-1(L) - Phi^-1(U)) / 2:

- Cohen's: U = 1 - L, L at level alpha;
- half, 9/10, 99/100: L at that share of alpha, U at the rest, for the class with most of the other estimation votes; no
  level is divided among the classes (see the proof there). `half` is what we ship;
- half / (K - 1): the same with U's level divided by the K - 1 other classes, by a union bound;
- grouped: the other classes in groups, which the selection votes make as even as they can; U's level divided by them;
- predicted: the share that would give the largest radius at the frequencies of the selection votes;
- joint: no split: p_A and the other class are tested together, by a weighted sum of the normal scores of two
  independent binomial p-values (n_A, and n_B among the votes that are not for A), the weights chosen by the selection.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special
from scipy.stats import norm

from spacte import cli
from spacte.logs.counts import read_counts
from spacte.logs.table import markdown
from spacte.report.labels import differing_parts
from spacte.smooth.bounds import lower_confidence_bound as lower
from spacte.smooth.bounds import upper_confidence_bound as upper
from spacte.smooth.certificates import multiclass_certificate
from spacte.utils import UserError

_IMAGES = 400  # simulated images of a column
_GRID = 400  # values of p_A at which the joint test looks


def _main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("counts", nargs="*", type=Path, metavar="COUNTS", help="vote counts of runs")
    parser.add_argument("--alpha", type=cli.open_probability, default=0.001, help="probability of a wrong certificate")
    args = parser.parse_args()
    columns = {f"K {k}, N {n}": simulated(k, n) for k in (10, 1000) for n in (1000, 10_000, 100_000)}
    paths = list(dict.fromkeys(path.resolve() for path in args.counts))
    titles = differing_parts(paths) if len(paths) > 1 else [path.name for path in paths]
    for title, path in zip(titles, paths, strict=True):
        columns[title] = [(one.selection[-1], one.estimation[-1], one.label) for one in read_counts(path)]
        if not columns[title] or len(columns[title][0][0]) < 2:
            raise UserError(f"'{path}' holds no image, or one class: there is nothing to compare")
    for title, votes in columns.items():
        print(f"\n{title}, {len(votes)} images\n\n{markdown(compared(votes, args.alpha))}", flush=True)


def simulated(classes: int, n: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Votes of images whose class 0 has a probability from 0.15^(1/2) to 1, the others even, uneven or one alone."""
    rng, votes = np.random.default_rng(0), []
    for _ in range(_IMAGES):
        p_a = rng.uniform(0.15, 1) ** 0.5
        others = rng.dirichlet(np.full(classes - 1, rng.choice([0.05, 0.3, 1]))) * (1 - p_a)
        p = np.append(p_a, others)
        votes.append((rng.multinomial(100, p), rng.multinomial(n, p), 0))
    return votes


def compared(votes: list, alpha: float) -> pd.DataFrame:
    """A row per rule."""
    cohens = np.array([split(*one[:2], alpha, 1.0) for one in votes])
    right = np.array([selection.argmax() == label for selection, _, label in votes])
    rows = []
    for name, rule in RULES.items():
        radii = np.array([rule(selection, estimation, alpha) for selection, estimation, _ in votes])
        change = radii - cohens
        row = {"rule": name, "mean radius": (radii * right).mean(), "certified": ((radii > 0) & right).mean()}
        rows.append(row | {"smaller": (change < -1e-9).mean(), "worst": change.min()})
    return pd.DataFrame(rows)


def split(selection, estimation, alpha, share, divided_by=1.0) -> float:
    """L at `share` of alpha, U at the rest divided by `divided_by`; in units of sigma, 0 where nothing is certified."""
    chosen, n = selection.argmax(), estimation.sum()
    low = float(lower(estimation[chosen], n, alpha * share))
    high = 1 - low
    if share < 1:
        high = min(high, float(upper(np.delete(estimation, chosen).max(), n, alpha * (1 - share) / divided_by)))
    return max(float(norm.ppf(low) - norm.ppf(high)) / 2, 0.0)


def grouped(selection, estimation, alpha) -> float:
    """The other classes packed into groups whose selection votes do not exceed the runner-up's."""
    chosen, n = selection.argmax(), estimation.sum()
    others = sorted(np.delete(np.arange(len(selection)), chosen), key=lambda k: -selection[k])
    size, groups = max(int(selection[others[0]]), 1), []
    for k in others:
        room = next((group for group in groups if selection[group].sum() + selection[k] <= size), None)
        if room is None:
            groups.append([k])
        else:
            room.append(k)
    low = float(lower(estimation[chosen], n, alpha / 2))
    high = max(float(upper(estimation[group].sum(), n, alpha / 2 / len(groups))) for group in groups)
    return max(float(norm.ppf(low) - norm.ppf(min(high, 1 - low))) / 2, 0.0)


def frequencies(selection) -> np.ndarray:
    """Class probabilities from the selection votes, half a vote added to each class."""
    return (selection + 0.5) / (selection.sum() + 0.5 * len(selection))


def predicted(selection, estimation, alpha) -> float:
    """The split that looks best at the selection's frequencies."""
    expected = np.round(frequencies(selection) * estimation.sum()).astype(int)
    shares = (0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
    best = max(shares, key=lambda share: split(selection, expected, alpha, share))
    return split(selection, estimation, alpha, best)


def joint(selection, estimation, alpha) -> float:
    """The largest margin that the joint test rejects for every p_A.

    For given (p_A, q), q = p_B / (1 - p_A), n_A is binomial and, given n_A, so is n_B among the other n - n_A votes; so
    P1 = P(Bin(n, p_A) >= n_A) and P2 = P(Bin(n - n_A, q) <= n_B) are p-values that are stochastically not smaller than
    two independent uniforms, and w1 z(P1) + w2 z(P2), z(P) = Phi^-1(1 - P), w1^2 + w2^2 = 1, exceeds z(alpha) with
    probability at most alpha. A margin is certified where that is so for every p_A, with the q that gives the margin.
    P1 grows with p_A and P2 falls, so that between two grid points the sum is at least that of P1's upper and P2's
    lower end.
    """
    chosen = int(selection.argmax())
    n, n_a, n_b = int(estimation.sum()), int(estimation[chosen]), int(np.delete(estimation, chosen).max())
    w1, w2 = weights(selection, chosen)
    edges = np.linspace(float(lower(n_a, n, 1e-12)), float(upper(n_a, n, 1e-12)), _GRID + 1)
    p, others = edges[:-1], n - n_a
    z1 = norm.isf(special.betainc(max(n_a, 1), n - n_a + 1, edges[1:]) if n_a else 1.0)

    def rejected(margin: float) -> bool:
        """Whether all pairs of probabilities that lie so close together are rejected at level alpha."""
        q = np.clip(norm.cdf(norm.ppf(p) - 2 * margin) / (1 - p), 0, 1)
        below = special.betainc(others - n_b, n_b + 1, 1 - q) if n_b < others else np.ones_like(q)
        with np.errstate(invalid="ignore"):
            return bool(np.all(w1 * z1 + (w2 * norm.isf(below) if w2 > 1e-12 else 0.0) >= norm.isf(alpha)))

    if not rejected(0.0):
        return 0.0
    certified, too_large = 0.0, 6.0
    for _ in range(40):
        middle = (certified + too_large) / 2
        certified, too_large = (middle, too_large) if rejected(middle) else (certified, middle)
    return certified


def weights(selection, chosen: int) -> tuple[float, float]:
    """The weights that are best where the selection's frequencies are the truth: each margin's share of the spread."""
    p = frequencies(selection)
    p_a, p_b = float(p[chosen]), float(np.delete(p, chosen).max())
    q = min(p_b / (1 - p_a), 1.0)
    density_a, density_b = norm.pdf(norm.ppf(p_a)), norm.pdf(norm.ppf(p_b))
    of_a = (1 / density_a + q / density_b) * np.sqrt(p_a * (1 - p_a))
    of_b = (1 - p_a) / density_b * np.sqrt(q * (1 - q) / (1 - p_a))
    return float(of_a / np.hypot(of_a, of_b)), float(of_b / np.hypot(of_a, of_b))


RULES: dict[str, Callable] = {
    "Cohen's": lambda s, e, alpha: split(s, e, alpha, 1.0),
    "half": lambda s, e, alpha: multiclass_certificate(s, e, alpha, 1.0)[1],
    "9/10": lambda s, e, alpha: split(s, e, alpha, 0.9),
    "99/100": lambda s, e, alpha: split(s, e, alpha, 0.99),
    "half / (K - 1)": lambda s, e, alpha: split(s, e, alpha, 0.5, len(s) - 1),
    "grouped": grouped,
    "predicted": predicted,
    "joint": joint,
}


if __name__ == "__main__":
    cli.run(_main)
