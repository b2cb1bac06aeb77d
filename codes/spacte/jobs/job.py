"""A job: what it is, how it stands on disk, its commands.

job -> commands
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spacte.files import replace_file
from spacte.names import CERTIFICATIONS, PLACE_SETTINGS, run_name_of_today
from spacte.utils import RunError, listed

_FREE_FLAGS = {  # a resumed run may change them
    "train": tuple(f"--{name}" for name in PLACE_SETTINGS),
    "certify": ("--data_dir", "--device", "--batch_size", "--max"),
}


@dataclass(frozen=True)
class Job:
    """A run with one seed, or an ensemble of `members` (no training, no seed); `certify` is None for training only.

    `after` are jobs that leave what its flags name.
    """

    name: str  # <defence>/<label>/seed-<k>; of an ensemble <defence>/<label>, or <defence>/<label>/seeds-<k>-<l>
    codes: Path
    work: Path
    seed: int | None
    train: tuple[str, ...] | None
    certify: tuple[str, ...] | None
    members: tuple["Job", ...] = ()
    after: tuple["Job", ...] = ()

    @property
    def needs(self) -> tuple["Job", ...]:
        """The jobs that have to be finished before it begins."""
        return (*self.members, *self.after)

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
        """What the queue file says of it and of the trainings that it takes something from, as job.json records it."""
        flags = {"train": self.train, "certify": self.certify}
        settings: dict[str, Any] = {step: None if own is None else flag_values(own) for step, own in flags.items()}
        settings |= {"members": {member.name: flag_values(member.train or ()) for member in self.members}}
        return settings | {"after": {one.name: flag_values(one.train or ()) for one in self._comes_after()}}

    def _comes_after(self) -> Iterator["Job"]:
        """What was trained before it: what it, or one that it needs, comes after."""
        yield from self.after
        for one in self.needs:
            yield from one._comes_after()


def flag_values(flags: tuple[str, ...] | list[str]) -> dict[str, list[str]]:
    """The values of each flag; of a flag that comes twice the last one counts, as for argparse."""
    settings, name = {}, ""
    for part in flags:
        if part.startswith("--"):
            name, _, value = part.partition("=")
            settings[name] = [value] if value else []
        else:
            settings[name].append(part)
    return settings


# --- a job on disk ---


def state(job: Job) -> str:
    """How it stands: finished, failed and why, begun and at which epoch, or waiting."""
    if is_finished(job):
        return "finished"
    failure = job.folder / "failed.txt"
    if failure.exists():
        return f"failed: {failure.read_text(errors='replace').strip()}"
    try:
        found = _checkpoints(job)
    except RunError as error:
        return f"failed: {error}"
    if found:
        return f"begun, at epoch {_epoch(found[-1])}"
    return "begun" if (job.folder / "output.txt").exists() else "waiting"


def is_finished(job: Job) -> bool:
    """Whether its commands have all ended well with today's settings, and its certification's summary is there."""
    record, settings = read_record(job), job.settings()
    own = ("train", "certify", "members")
    if not record.get("finished") or any(record.get(name) != settings[name] for name in own):
        return False
    if any(_changed("train", before, now) for before, now in _trained_before(record, settings).values()):
        return False
    return job.certify is None or any(job.folder.glob(f"logs/*/*/*/{CERTIFICATIONS}/*-ACR.log"))


def read_record(job: Job) -> dict:
    """job.json: the settings with which the job was last started, whether it is finished, the seconds that it took."""
    try:
        found = json.loads((job.folder / "job.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_record(job: Job, finished: bool, seconds: float | None = None) -> None:
    """Write job.json; the seconds that it says already stay where none are given."""
    if seconds is None:
        seconds = read_record(job).get("seconds")
    content = json.dumps(job.settings() | {"finished": finished, "seconds": seconds})
    replace_file(job.folder / "job.json", content + "\n")


def check_unchanged(job: Job) -> None:
    """RunError if the job has checkpoints or logs that were made with flags that compute something else."""
    before, now, logs = read_record(job), job.settings(), list(job.folder.glob(f"logs/*/*/*/{CERTIFICATIONS}/*.json"))
    for step, made in (("train", _checkpoints(job)), ("certify", logs)):
        if made:
            _check_same_flags(f"its {step} flags have", step, before.get(step), now[step], job.folder)
    if logs or _checkpoints(job):
        for name, (there, here) in _trained_before(before, now).items():
            _check_same_flags(f"the train flags of {name} have", "train", there, here, job.folder)


def _trained_before(record: dict, settings: dict) -> dict[str, tuple[dict, dict]]:
    """The train flags, as they were recorded and as they are, of the jobs that it needs, as far as both are known:
    older versions recorded an ensemble's members alone.
    """
    found = {}
    for kind in ("members", "after"):
        recorded = record.get(kind)
        for name, now in settings[kind].items():
            if isinstance(recorded, dict) and isinstance(recorded.get(name), dict):
                found[name] = recorded[name], now
    return found


def _changed(step: str, before: dict, now: dict) -> list[str]:
    """The flags that decide what is computed, and are others now."""
    names = sorted({*before, *now} - set(_FREE_FLAGS[step]))
    return [name for name in names if before.get(name) != now.get(name)]


def _check_same_flags(which: str, step: str, before: dict | None, now: dict | None, folder: Path) -> None:
    before, now = before if isinstance(before, dict) else {}, now or {}
    changed = _changed(step, before, now)
    if before and changed:
        there, here = (" ".join(flags.get(changed[0], ["not given"])) for flags in (before, now))
        raise RunError(
            f"{which} changed ({changed[0]}: {there} before, {here} now): change them back, give the "
            f"run another label, or remove '{folder}'"
        )


def remove_old_checkpoints(job: Job, keep: int) -> None:
    """Remove all but the newest `keep` of its checkpoints."""
    for path in _checkpoints(job)[:-keep]:
        path.unlink(missing_ok=True)


def last_line(output: Path) -> str:
    """The last line of a file that holds something."""
    with open(output, "rb") as file:
        file.seek(max(0, output.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def left_on_disk(job: Job) -> dict[Path, int]:
    """The checkpoints and counts with which it would resume, and their sizes."""
    votes = [_in_work(job, part) for part in flag_values(job.train or ()).get("--votes_dir", ["votes"])]
    folders = [job.folder, *(job.scripts / folder for folder in votes)]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".pth", ".jsonl")]
    return {path: path.stat().st_size for path in found}


def _checkpoints(job: Job) -> list[Path]:
    """The checkpoints, in the order of their epochs. RunError if they are of several runs."""
    found = [path for path in job.folder.glob("save/*/*/*/*/epoch*.pth") if path.stem[5:].isdecimal()]
    runs = sorted({path.parent.name for path in found})
    if len(runs) > 1:
        raise RunError(f"'{job.folder / 'save'}' holds several runs: {listed(runs)}; move all but one away")
    return sorted(found, key=_epoch)


def _epoch(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("epoch"))


def last_checkpoint(job: Job) -> Path:
    """Its newest on disk. RunError if there is none, or checkpoints of several runs."""
    found = _checkpoints(job)
    if not found:
        raise RunError(f"there is no checkpoint in '{job.folder / 'save'}'")
    return found[-1]


# --- its commands ---


def train_command(job: Job) -> list[str]:
    """What trains the job, or resumes its training."""
    folders = [part for kind in ("save", "logs", "runs") for part in (f"--{kind}_dir", str(job.folder / kind))]
    own = [_in_work(job, part) for part in job.train or ()]
    return [sys.executable, "train.py", *own, "--seed", str(job.seed), *folders, "--resume"]


def certify_command(job: Job) -> list[str]:
    """What certifies the last checkpoint of the job, or of each of its members. RunError if one has none."""
    own = [_in_work(job, part) for part in job.certify or ()]
    command = [sys.executable, "certify_mhead.py", *own, "--logs_dir", str(job.folder / "logs"), "--model_path"]
    return command + [str(last_checkpoint(one)) for one in job.members or (job,)]


def _in_work(job: Job, part: str) -> str:
    """A part of a job's flags with the work folder in place of WORK/, also after --name=.

    Queue files may name runs as older versions did: a path that is not there is taken by today's names of runs.
    """
    found = re.fullmatch(r"(--\w+=)?WORK/(.*)", part, re.DOTALL)
    if not found:
        return part
    path = job.work / found[2]
    return (found[1] or "") + str(path if path.exists() else Path(*map(run_name_of_today, path.parts)))
