"""What the intervals of a comparison do not count, in sentences."""

from collections.abc import Iterator

from spacte.report.comparable import INPUTS, checkpoints_of, inputs_of
from spacte.report.intervals import FEWEST_SEEDS
from spacte.report.run import Run

Side = tuple[str, list[Run]]  # an experiment's name and its runs


def of_runs(a: Run, b: Run) -> Iterator[str]:
    """On two runs, each one training."""
    if not checkpoints_of(a) or checkpoints_of(a) != checkpoints_of(b):  # not known to certify one classifier
        yield "One run each: the interval is for other images, not for other trainings."


def of_experiments(a: Side, b: Side) -> Iterator[str]:
    """On the runs of two experiments."""
    fewer, more = sorted((a, b), key=lambda side: len(side[1]))
    runs = len(fewer[1]), len(more[1])
    yield f"The means over {len(a[1])} and {len(b[1])} runs are compared."
    if runs[0] == 1:
        another = (
            f"the {runs[1]} of '{more[0]}' are too few to tell how much another would differ"
            if seeds_are_few(runs)
            else f"another is taken to differ as much as those of '{more[0]}' do"
        )
        yield f"Of '{fewer[0]}' there is one run: {another}."
        if 0 < _networks(fewer[1][0]) < _networks(more[1][0]):
            networks = f"'{fewer[0]}' has fewer networks than those"
            yield f"{networks}, and runs of fewer vary more: the interval is too narrow."
    elif runs[0] == 2:
        two = " and ".join(f"'{name}'" for name, some in (a, b) if len(some) == 2)
        yield f"Two runs of {two} tell little of how seeds vary: a 95 % interval may miss in up to 14 % of cases."
    for name, some in (a, b):
        shared = _shared_inputs(some)
        if shared:
            yield (
                f"All {len(some)} runs of '{name}' took the same {' and '.join(shared)}: what another would change is "
                "not in the interval."
            )


def seeds_are_few(runs: tuple[int, int]) -> bool:
    """Whether `experiments_interval` has none, because of the two experiments' numbers of runs."""
    return min(runs) == 1 and max(runs) < FEWEST_SEEDS


def _networks(run: Run) -> int:
    """How many vote together; 0 where nothing tells."""
    return len(run.heads.networks) if run.heads else 0


def _shared_inputs(runs: list[Run]) -> list[str]:
    """What the trainings of several runs took from the same files, all of them: teachers, trunk, pretrained network.

    By the files' hashes or, where a training has recorded none, by their names.
    """
    trainings, found = [one for run in runs for one in run.training or ({},)], []
    for name in dict.fromkeys([*INPUTS, *(name for one in trainings for name in inputs_of(one))]):
        hashes = [one["inputs"].get(name) for one in trainings if isinstance(one.get("inputs"), dict)]
        known = len(hashes) == len(trainings) and all(hashes)
        taken = hashes if known else [one.get(name) for one in trainings]
        if len(runs) > 1 and taken[0] and taken.count(taken[0]) == len(taken):
            found.append(INPUTS.get(name, name))
    return found
