"""The jobs of a queue file: what each is, how it stands on disk, its commands.

queue file -> jobs -> commands
"""

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spacte.utils import RunError, UserError, replace_file

_SET_BY_THE_QUEUE = {
    "train": ("--seed", "--resume", "--save_dir", "--logs_dir", "--runs_dir"),
    "certify": ("--model_path", "--logs_dir", "--overwrite", "--shard"),
}
_FREE_FLAGS = {  # a run that goes on may change them
    "train": ("--data_dir", "--device", "--workers", "--save_freq", "--test_freq"),
    "certify": ("--data_dir", "--device", "--batch_size", "--max"),
}


@dataclass(frozen=True)
class Job:
    """A run with one seed, or an ensemble of `members` (no training, no seed); `certify` is None for training only."""

    name: str  # <defence>/<label>/seed-<k>, or <defence>/<label>
    codes: Path
    work: Path
    seed: int | None
    train: tuple[str, ...] | None
    certify: tuple[str, ...] | None
    members: tuple["Job", ...] = ()

    @property
    def folder(self) -> Path:
        """Where all of its files are."""
        return self.work / self.name

    @property
    def scripts(self) -> Path:
        """The defence's folder, in which its commands are run."""
        return self.codes / self.name.split("/")[0]

    @property
    def run_name(self) -> str:
        """<defence>/<label>."""
        return "/".join(self.name.split("/")[:2])

    def settings(self) -> dict:
        """What the queue file says of it, as job.json records it."""
        flags = {"train": self.train, "certify": self.certify}
        settings = {step: None if own is None else _by_name(own) for step, own in flags.items()}
        return settings | {"members": {member.name: member.settings()["train"] for member in self.members}}


def _by_name(flags: tuple[str, ...] | list[str]) -> dict[str, list[str]]:
    """The values of each flag; of a flag that comes twice the last one counts, as for argparse."""
    settings, name = {}, ""
    for part in flags:
        if part.startswith("--"):
            name, _, value = part.partition("=")
            settings[name] = [value] if value else []
        else:
            settings[name].append(part)
    return settings


# --- the queue file ---


def read_queue(path: Path, codes: Path, work: Path, order: str) -> list[Job]:
    """The jobs of a queue file, the ensembles last.

    `codes` holds the defences' folders. `order` is "seeds" (every run's first seed, then every run's second, ...) or
    "runs" (all seeds of a run, then the next run). Raises UserError, which names the file and what is legal, where the
    file is wrong.
    """
    content = _read_toml(path)
    defaults, runs = content.get("defaults", {}), {}
    _check_keys(f"'{path}', defaults", defaults, {"seeds": list, "train": str, "certify": str})
    for entry in content.get("run", []):
        keys = {"label": str, "defence": str, "seeds": list, "train": str, "certify": (str, bool)}
        where = _check_entry(path, "run", entry, keys, ("label", "defence"), taken=runs)
        runs[entry["label"]] = _jobs_of_run(where, entry, defaults, codes, work)
    if not runs:
        raise UserError(f"'{path}' has no [[run]]")
    jobs = [job for run in runs.values() for job in run]
    if order == "seeds":
        jobs = [run[k] for k in range(max(map(len, runs.values()))) for run in runs.values() if k < len(run)]
    labels = list(runs)
    for entry in content.get("ensemble", []):
        keys = {"label": str, "of": str, "certify": str}
        where = _check_entry(path, "ensemble", entry, keys, ("label", "of"), taken=labels)
        if entry["of"] not in runs:
            raise UserError(f"{where}: of = '{entry['of']}' must be the label of a run: {', '.join(runs)}")
        members = tuple(runs[entry["of"]])
        labels.append(entry["label"])
        name = f"{members[0].scripts.name}/{entry['label']}"
        jobs.append(Job(name, codes, work, None, None, _flags(where, "certify", defaults, entry), members))
    return jobs


def _read_toml(path: Path) -> dict:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is no readable TOML file: {getattr(error, 'strerror', None) or error}") from error
    _check_keys(f"'{path}'", content, {"defaults": dict, "run": list, "ensemble": list})
    return content


def _check_entry(path: Path, kind: str, entry: dict, keys: dict, required: tuple[str, str], taken) -> str:
    """Returns what an error message about the entry begins with."""
    if not isinstance(entry, dict):
        raise UserError(f"'{path}': {kind} must be tables, [[{kind}]]")
    where = f"'{path}', {kind} '{entry.get('label', '')}'"
    _check_keys(where, entry, keys)
    for name in required:
        if name not in entry:
            raise UserError(f"{where}: its {name} is missing")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", entry["label"]):
        raise UserError(f"{where}: a label is the name of a folder: letters, digits, '.', '_', '+' and '-'")
    if entry["label"] in taken:
        raise UserError(f"{where}: the label is taken; there are {', '.join(taken)}")
    return where


def _check_keys(where: str, table: dict, legal: dict) -> None:
    kinds = {str: "a string", list: "a list", dict: "a table", (str, bool): "a string or false"}
    for name, value in table.items():
        if name not in legal:
            raise UserError(f"{where}: unknown key '{name}'; there are {', '.join(legal)}")
        if not isinstance(value, legal[name]) or value is True:
            raise UserError(f"{where}: {name} must be {kinds[legal[name]]}")


def _jobs_of_run(where: str, entry: dict, defaults: dict, codes: Path, work: Path) -> list[Job]:
    defences = sorted(file.parent.name for file in codes.glob("*/train.py"))
    if entry["defence"] not in defences:
        raise UserError(f"{where}: defence '{entry['defence']}' must be one of {', '.join(defences)}")
    seeds = entry.get("seeds", defaults.get("seeds", []))
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds must be integers of at least 0, one or more, each once; they are {seeds}")
    train = _flags(where, "train", defaults, entry)
    certify = None if entry.get("certify") is False else _flags(where, "certify", defaults, entry)
    folder = f"{entry['defence']}/{entry['label']}"
    return [Job(f"{folder}/seed-{seed}", codes, work, seed, train, certify) for seed in seeds]


def _flags(where: str, step: str, defaults: dict, entry: dict) -> tuple[str, ...]:
    """The flags of a step: the defaults', then the entry's own. UserError where the queue sets one of them itself."""
    flags = []
    for text in (defaults.get(step, ""), entry.get(step, "")):
        try:
            own = shlex.split(text)
        except ValueError as error:
            raise UserError(f"{where}: {step} = '{text}': {error}") from error
        if own and not own[0].startswith("--"):
            raise UserError(f"{where}: {step} = '{text}' must begin with a flag, --...")
        flags += own
    for name in _by_name(flags):
        if name in _SET_BY_THE_QUEUE[step]:
            taken = ", ".join(_SET_BY_THE_QUEUE[step])
            raise UserError(f"{where}: {step} must not hold {name}: the queue itself sees to {taken}")
    return tuple(flags)


# --- a job on disk ---


def state(job: Job) -> str:
    """How it stands: finished, failed and why, begun and at which epoch, or waiting."""
    if is_finished(job):
        return "finished"
    failure = job.folder / "failed.txt"
    if failure.exists():
        return f"failed: {failure.read_text().strip()}"
    try:
        found = _checkpoints(job)
    except RunError as error:
        return f"failed: {error}"
    if found:
        return f"begun, at epoch {_epoch(found[-1])}"
    return "begun" if (job.folder / "output.txt").exists() else "waiting"


def is_finished(job: Job) -> bool:
    """Whether its commands have all ended well with today's settings, and its certification's summary is there."""
    note, settings = recorded(job), job.settings()
    if not note.get("finished") or {name: note.get(name) for name in settings} != settings:
        return False
    return job.certify is None or any(job.folder.glob("logs/*/*/*/certify-mhead/*-ACR.log"))


def recorded(job: Job) -> dict:
    """job.json: the settings that the job was last begun with, whether it is finished, the seconds that it took."""
    try:
        return json.loads((job.folder / "job.json").read_text())
    except (OSError, ValueError):
        return {}


def record(job: Job, finished: bool, seconds: float | None = None) -> None:
    """Write job.json; the seconds that it says already stay where none are given."""
    if seconds is None:
        seconds = recorded(job).get("seconds")
    content = json.dumps(job.settings() | {"finished": finished, "seconds": seconds})
    replace_file(job.folder / "job.json", lambda temporary: temporary.write_text(content + "\n"))


def check_unchanged(job: Job) -> None:
    """RunError where the job has checkpoints or logs that were made with flags that compute something else."""
    before, now, logs = recorded(job), job.settings(), list(job.folder.glob("logs/*/*/*/certify-mhead/*.json"))
    for step, made in (("train", _checkpoints(job)), ("certify", logs)):
        if made:
            _check_same_flags(f"its {step} flags have", step, before.get(step), now[step], job.folder)
    members = before.get("members")
    for name, flags in now["members"].items():
        if logs and isinstance(members, dict):
            _check_same_flags(f"the train flags of {name} have", "train", members.get(name), flags, job.folder)


def _check_same_flags(which: str, step: str, before: dict | None, now: dict | None, folder: Path) -> None:
    before, now = before or {}, now or {}
    names = sorted(set(before | now) - set(_FREE_FLAGS[step]))
    changed = [name for name in names if before.get(name) != now.get(name)]
    if before and changed:
        there, here = (" ".join(flags.get(changed[0], ["not given"])) for flags in (before, now))
        raise RunError(
            f"{which} changed since it was begun ({changed[0]}: {there} then, {here} now): change them back, give the "
            f"run another label, or remove '{folder}'"
        )


def remove_old_checkpoints(job: Job, keep: int) -> None:
    """Remove all but the newest `keep` of its checkpoints."""
    for path in _checkpoints(job)[:-keep]:
        path.unlink(missing_ok=True)


def _checkpoints(job: Job) -> list[Path]:
    """In the order of their epochs. RunError where they are of several runs."""
    found = [path for path in job.folder.glob("save/*/*/*/*/epoch*.pth") if path.stem[5:].isdecimal()]
    runs = sorted({path.parent.name for path in found})
    if len(runs) > 1:
        raise RunError(f"'{job.folder / 'save'}' holds several runs: {', '.join(runs)}; move all but one away")
    return sorted(found, key=_epoch)


def _epoch(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("epoch"))


def _last_checkpoint(job: Job) -> str:
    found = _checkpoints(job)
    if not found:
        raise RunError(f"there is no checkpoint in '{job.folder / 'save'}'")
    return str(found[-1])


# --- its commands ---


def commands(job: Job) -> Iterator[list[str]]:
    """The job's commands, one after the other: ask for the next one once the one before has ended well."""
    if job.train is not None:
        yield _train_command(job)
        remove_old_checkpoints(job, keep=1)
    if job.certify is not None:
        yield [*_certify_command(job), *map(_last_checkpoint, job.members or (job,))]


def _train_command(job: Job) -> list[str]:
    folders = [part for kind in ("save", "logs", "runs") for part in (f"--{kind}_dir", str(job.folder / kind))]
    own = [str(job.work) + part[4:] if part.startswith("WORK/") else part for part in job.train]
    return [sys.executable, "train.py", *own, "--seed", str(job.seed), *folders, "--resume"]


def _certify_command(job: Job) -> list[str]:
    """All but the checkpoints, which come last."""
    return [sys.executable, "certify_mhead.py", *job.certify, "--logs_dir", str(job.folder / "logs"), "--model_path"]
