"""The queue file: runs and ensembles, each of which names its flags and seeds.

queue file -> jobs
"""

import graphlib
import re
import shlex
import tomllib
from collections.abc import Collection
from pathlib import Path

from spacte.jobs.job import Job, flag_values
from spacte.utils import UserError, listed

_SET_BY_THE_QUEUE = {
    "train": ("--seed", "--resume", "--save_dir", "--logs_dir", "--runs_dir"),
    "certify": ("--model_path", "--logs_dir", "--overwrite", "--shard"),
}


def read_queue(path: Path, codes: Path, work: Path, order: str) -> list[Job]:
    """The jobs of a queue file, each after those that it needs, the ensembles last.

    `codes` holds the defences' folders. `order` is "seeds" (every run's first seed, then every run's second, ...) or
    "runs" (all seeds of a run, then the next run). Raises UserError, which names the file and what is legal, where the
    file is wrong.
    """
    content = _read_toml(path)
    defaults: dict = content.get("defaults", {})
    entries: dict[str, tuple[str, dict]] = {}
    _check_keys(f"'{path}', defaults", defaults, {"seeds": list, "train": str, "certify": (str, bool)})
    for entry in content.get("run", []):
        keys = {"label": str, "defence": str, "seeds": list, "train": str, "certify": (str, bool)}
        keys["after"] = (str, list)
        where = _check_entry(path, "run", entry, keys, ("label", "defence"), taken=entries)
        entries[entry["label"]] = where, entry
    if not entries:
        raise UserError(f"'{path}' has no [[run]]")
    runs = _runs(entries, defaults, codes, work)
    jobs = [job for run in runs.values() for job in run]
    if order == "seeds":
        jobs = [run[k] for k in range(max(map(len, runs.values()))) for run in runs.values() if k < len(run)]
    labels = list(runs)
    for entry in content.get("ensemble", []):
        keys = {"label": str, "of": str, "seeds": list, "certify": str}
        where = _check_entry(path, "ensemble", entry, keys, ("label", "of"), taken=labels)
        if entry["of"] not in runs:
            raise UserError(f"{where}: of = '{entry['of']}' must be the label of a run: {listed(runs)}")
        labels.append(entry["label"])
        certify = _flags(where, "certify", defaults, entry)
        for name, members in _ensembles(where, entry, runs[entry["of"]]).items():
            jobs.append(Job(name, codes, work, None, None, certify, members))
    ordered: dict[str, Job] = {}
    for job in jobs:
        _add_behind_its_needs(job, ordered)
    return list(ordered.values())


def _add_behind_its_needs(job: Job, ordered: dict[str, Job]) -> None:
    if job.name in ordered:
        return
    for needed in job.needs:
        _add_behind_its_needs(needed, ordered)
    ordered[job.name] = job


def _read_toml(path: Path) -> dict:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not a readable TOML file: {getattr(error, 'strerror', None) or error}") from error
    _check_keys(f"'{path}'", content, {"defaults": dict, "run": list, "ensemble": list})
    return content


def _check_entry(
    path: Path, kind: str, entry: dict, keys: dict, required: tuple[str, str], taken: Collection[str]
) -> str:
    """Returns what an error message about the entry begins with."""
    if not isinstance(entry, dict):
        raise UserError(f"'{path}': {kind} must be tables, [[{kind}]]")
    where = f"'{path}', {kind} '{entry.get('label', '')}'"
    _check_keys(where, entry, keys)
    for name in required:
        if name not in entry:
            raise UserError(f"{where}: its {name} is missing")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}", entry["label"]):
        raise UserError(f"{where}: a label is the name of a folder: at most 200 letters, digits, '.', '_', '+' and '-'")
    if entry["label"] in taken:
        raise UserError(f"{where}: the label is taken; there are {listed(taken)}")
    return where


def _check_keys(where: str, table: dict, legal: dict) -> None:
    kinds = {str: "a string", list: "a list", dict: "a table", (str, bool): "a string or false"}
    kinds |= {(str, list): "a label or a list of labels"}
    for name, value in table.items():
        if name not in legal:
            raise UserError(f"{where}: unknown key '{name}'; there are {', '.join(legal)}")
        if not isinstance(value, legal[name]) or value is True:
            raise UserError(f"{where}: {name} must be {kinds[legal[name]]}")


def _runs(entries: dict[str, tuple[str, dict]], defaults: dict, codes: Path, work: Path) -> dict[str, list[Job]]:
    """The jobs of each run by its label, in the file's order."""
    after = {label: _after_of(where, entry, entries) for label, (where, entry) in entries.items()}
    try:
        order = list(graphlib.TopologicalSorter(after).static_order())
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]
        where, entry = entries[circle[0]]
        raise UserError(f"{where}: after = {entry['after']!r} is circular: {' after '.join(circle)}") from None
    runs: dict[str, list[Job]] = {}
    for label in order:
        where, entry = entries[label]
        flags = f"{defaults.get('train', '')} {entry.get('train', '')}"
        needed = [job for other in after[label] for job in _named(flags, runs[other])]
        runs[label] = _jobs_of_run(where, entry, defaults, codes, work, tuple(needed))
    for label, (where, _) in entries.items():
        _check_what_flags_name(where, runs[label][0], [label, *after[label]], runs)
    return {label: runs[label] for label in entries}


def _named(flags: str, jobs: list[Job]) -> list[Job]:
    """Those of a run's jobs that the flags name, or all."""
    return [job for job in jobs if f"WORK/{job.name}/" in flags] or jobs


def _check_what_flags_name(where: str, job: Job, known: list[str], runs: dict[str, list[Job]]) -> None:
    """UserError if the train flags name what a run of this file leaves, without `after`, or no job of it leaves."""
    labels = {jobs[0].run_name: label for label, jobs in runs.items()}
    for run, seed in re.findall(r"\bWORK/([^/ ]+/[^/ ]+)/([^/ ]+)", " ".join(job.train or ())):
        label = labels.get(run)
        if label is None:  # another file's, perhaps
            continue
        if label not in known:
            raise UserError(f'{where}: its train flags name WORK/{run}: give it after = "{label}"')
        names = [one.name for one in runs[label]]
        if f"{run}/{seed}" not in names:
            raise UserError(f"{where}: its train flags name WORK/{run}/{seed}; there are {listed(names)}")


def _after_of(where: str, entry: dict, runs: Collection[str]) -> list[str]:
    """The runs that an entry's `after` names."""
    after = entry.get("after", [])
    labels = [after] if isinstance(after, str) else after
    for label in labels:
        if not isinstance(label, str) or label not in runs or label == entry["label"]:
            others = listed(run for run in runs if run != entry["label"])
            raise UserError(f"{where}: after = '{label}' must be the label of another run, no ensemble: {others}")
    return labels


def _jobs_of_run(where: str, entry: dict, defaults: dict, codes: Path, work: Path, after: tuple[Job, ...]) -> list[Job]:
    defences = sorted(file.parent.name for file in codes.glob("*/train.py"))
    if entry["defence"] not in defences:
        raise UserError(f"{where}: defence '{entry['defence']}' must be one of {', '.join(defences)}")
    seeds = entry.get("seeds", defaults.get("seeds", []))
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds must be integers of at least 0, one or more, each once; they are {seeds}")
    train = _flags(where, "train", defaults, entry)
    trained_only = entry.get("certify", defaults.get("certify")) is False
    certify = None if trained_only else _flags(where, "certify", defaults, entry)
    folder = f"{entry['defence']}/{entry['label']}"
    return [Job(f"{folder}/seed-{seed}", codes, work, seed, train, certify, after=after) for seed in seeds]


def _ensembles(where: str, entry: dict, jobs: list[Job]) -> dict[str, tuple[Job, ...]]:
    """An entry's ensembles by name, each with its members: of all of the run's seeds, or of those of each list."""
    name, of_seed = f"{jobs[0].scripts.name}/{entry['label']}", {job.seed: job for job in jobs}
    if "seeds" not in entry:
        return {name: tuple(jobs)}
    if not entry["seeds"]:
        raise UserError(f"{where}: seeds is empty; it must be lists of seeds of its run, or be left out")
    found: dict[str, tuple[Job, ...]] = {}
    for seeds in entry["seeds"]:
        legal = isinstance(seeds, list) and seeds and all(type(seed) is int and seed in of_seed for seed in seeds)
        if not legal or len(set(seeds)) < len(seeds):
            raise UserError(
                f"{where}: seeds must be lists of seeds of its run ({listed(of_seed)}), each list an "
                f"ensemble in which no seed comes twice; one is {seeds}"
            )
        if any(set(seeds) == {job.seed for job in members} for members in found.values()):
            raise UserError(f"{where}: two of its lists of seeds are one ensemble, {seeds}")
        found[f"{name}/seeds-{'-'.join(map(str, seeds))}"] = tuple(of_seed[seed] for seed in seeds)
    return found


def _flags(where: str, step: str, defaults: dict, entry: dict) -> tuple[str, ...]:
    """The flags of a step: the defaults', then the entry's own. UserError if the queue sets one of them itself."""
    flags = []
    for text in (defaults.get(step) or "", entry.get(step) or ""):
        try:
            own = shlex.split(text)
        except ValueError as error:
            raise UserError(f"{where}: {step} = '{text}': {error}") from error
        if own and not own[0].startswith("--"):
            raise UserError(f"{where}: {step} = '{text}' must begin with a flag, --...")
        flags += own
    for name in flag_values(flags):
        if name in _SET_BY_THE_QUEUE[step]:
            taken = ", ".join(_SET_BY_THE_QUEUE[step])
            raise UserError(f"{where}: {step} must not hold {name}: the queue sets {taken}")
    return tuple(flags)
