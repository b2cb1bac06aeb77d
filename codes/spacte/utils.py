"""What every part needs and none owns: errors for the user, seeds, files that are never half written, versions."""

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "statsmodels", "pandas", "scikit-learn")
_DECIDE_VOTES = ("torch", "torchvision", "numpy", "scipy")


class UserError(ValueError):
    """A wrong flag, file or folder; its text is one line that names the legal values."""

    exit_code = 2


class TakenError(UserError):
    """What another process has or has yet to leave: later the same command will do. EX_TEMPFAIL tells schedulers so."""

    exit_code = 75


class RunError(RuntimeError):
    """A run that cannot continue, for a reason that its one line gives."""

    exit_code = 1


FOREIGN_ERRORS = (Exception, SystemExit)  # what a user's function may end with, short of Ctrl-C


def listed(names: Iterable, most: int = 10) -> str:
    """The names as a part of a message, which stays short: a, b and 12 more."""
    texts = list(map(str, names))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


_LONGEST_NAME = 150  # bytes; what is put behind it, -certify-skip-20-...-counts.jsonl say, has the other hundred


def printable_name(text: str) -> str:
    """The text as a part of a file's name: letters, digits, '.', '_', '+' and '-' stay, the rest becomes '_'.

    The end of one that is too long for a file's name becomes its hash.
    """
    name = re.sub(r"[^\w.+-]", "_", text).lstrip(".") or "_"
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name.encode()[: _LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"


def failure(error: BaseException) -> str:
    """An exception of the user's code as a line, with the innermost line of theirs that it passed."""
    library = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if not one.filename.startswith((library, "<")) and "site-packages" not in one.filename]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(text)}{text}{where}"


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a function of the purpose and the numbers (0 to 2^64 - 1) alone, mixed by SeedSequence.

    torch's CPU generator keeps 32 bits of it: that two of 10,000 images share their noise has a chance of 1 %, which
    no image's certificate depends on.
    """
    words = [len(purpose), *purpose.encode()]
    for number in numbers:
        words += [number & 0xFFFFFFFF, number >> 32]
    return int(np.random.SeedSequence([len(words), *words]).generate_state(1, np.uint64)[0] >> 1)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents; UserError where this is not possible or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{folder}': {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to '{folder}': permission denied")
    return folder


@contextlib.contextmanager
def gone_on_failure(*folders: Path) -> Iterator[None]:
    """If the block raises, those of the folders and their parents that it made are gone again if they are empty."""
    missing = {path for folder in folders for path in (folder, *folder.parents) if not path.exists()}
    try:
        yield
    except BaseException:
        for path in sorted(missing, reverse=True):  # what lies in a folder before the folder
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


_TAKEN = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS with nolock
_UNLOCKED = "the filesystem has no locks: see to it that no two commands write the same run at a time"


def lock(path: Path, taken: str, shared: bool = False) -> TextIO:
    """Open a file and lock it while it stays open, alone or with others that share it; returns the file.

    TakenError `taken` where another process holds the lock, or UserError where the file cannot be written. Where the
    filesystem has no locks, a warning says so, once.
    """
    import fcntl  # not on Windows, where logs can be read

    try:
        held = open(path, "a")  # noqa: SIM115 - the caller's
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    try:
        fcntl.flock(held, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            warnings.warn(_UNLOCKED, stacklevel=1)  # of this line: Python says it once
            return held
        held.close()
        if error.errno in _TAKEN:
            raise TakenError(taken) from error
        raise UserError(f"cannot lock '{path}': {error.strerror}") from error
    return held


def replace_file(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file beside `path` and rename it to `path`: a reader sees the old file or the whole new one.

    What killed processes have left there of theirs is removed. Raises UserError where it cannot be written.
    """
    remove_leftovers(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never there
            temporary.unlink()


_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\..+\.(\d+)-([0-9a-f]{8})\.tmp")
_ABANDONED = 24 * 60 * 60  # seconds: nobody writes for so long, on another machine either


def temporary_name(name: str) -> str:
    """What this process calls a file or folder until it is complete."""
    return f".{name}.{os.getpid()}-{_HOST}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Remove from the folder what processes that were killed have left unfinished."""
    for path in folder.glob(".*.tmp"):
        named = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(OSError):  # another one removes it, too, or it is another user's
            if named and (_is_gone(int(named[1]), named[2]) or time.time() - path.stat().st_mtime > _ABANDONED):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_gone(process: int, host: str) -> bool:
    if host != _HOST:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False


_PR_SET_PDEATHSIG = 1
_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a fork's child should not load


def end_with_parent() -> None:
    """From now on this process ends with the one that started it, by SIGTERM; on Linux alone."""
    if _C_LIBRARY is not None:
        _C_LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_sha256(*files: str) -> str:
    """The SHA-256 of this library's source, and of the .py files (no links) beside each of `files`."""
    library, digest = Path(__file__).parent, hashlib.sha256()
    sources = sorted(library.rglob("*.py"))
    for file in files:
        sources += sorted(path for path in Path(file).parent.glob("*.py") if not path.is_symlink())
    for source in sources:
        digest.update(f"{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def source_state(*files: str) -> dict[str, Any]:
    """The code that runs, for the record: its hash (see `source_sha256`), and the commit and whether the source differs
    from it where the library lies in a git checkout (None elsewhere).
    """
    state: dict[str, Any] = {"source_sha256": source_sha256(*files), "commit": None, "dirty": None}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        folders = [Path(__file__).resolve().parent, *(Path(file).resolve().parent for file in files)]
        git = ["git", "-C", str(folders[0])]
        own = str(Path(__file__).resolve())  # a defence's folder has a link to the library
        _output([*git, "ls-files", "--error-unmatch", "--", own])  # not installed within another's
        state["commit"] = _output([*git, "rev-parse", "HEAD"])
        status = [*git, "status", "--porcelain", "-uall", "--", *(f"{folder}/*.py" for folder in folders)]
        state["dirty"] = bool(_output(status))
    return state


def _output(command: list[str]) -> str:
    """What a command prints. SubprocessError where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def deciding_versions(versions: dict[str, str]) -> dict[str, str | None]:
    """Those of `package_versions` that a vote or a bound may depend on; of Python's, not the patch release."""
    python = ".".join(versions["python"].split(".")[:2])
    return {"python": python, **{name: versions.get(name) for name in _DECIDE_VOTES}}


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def check_ending(path: Path, endings: tuple[str, ...]) -> None:
    """UserError where the path has none of the endings."""
    if path.suffix not in endings:
        raise UserError(f"'{path}' must end in {', '.join(endings)}")


def run_tail(dataset: str, arch: str, noise_sd: float) -> Path:
    """The part that all of a run's folders share: <dataset>/<arch>/noise-<sd>, sd with at least two decimals."""
    two_decimals = f"{noise_sd:.2f}"
    return Path(dataset, arch, f"noise-{two_decimals if float(two_decimals) == noise_sd else noise_sd}")


_LATER_SETTINGS = {  # of a training run, with what runs did before they were recorded
    "paced_by": "neighbour",
    "pace_share": None,
    "whole_gradient": False,
    "teachers": (),
    "frozen_trunk": None,
}


def as_recorded_today(training: dict) -> dict:
    """The settings of a training run, as any version recorded them, by today's names."""
    training = dict(training)
    if training.pop("no_teaching", False):
        training["paced_by"] = "none"
    return _LATER_SETTINGS | training if training else training


def unused_settings(training: dict) -> tuple[str, ...]:
    """Those of a training run's settings on which nothing in it depends.

    One head shares its weight with no other (eps), and has no lambda (lbdlast) unless it paces itself.
    """
    if training.get("num_heads") != 1:
        return ()
    return ("eps",) if training.get("paced_by") == "self" else ("eps", "lbdlast")


_NUMBER = r"\d[\d.]*(?:e[-+]?\d+)?"
_OLDER_NAME = re.compile(rf"(?<![^+])h-1-eps-{_NUMBER}(-m-\d+)(-lbdlast-{_NUMBER})([^+]*)")


def run_name_of_today(run: str) -> str:
    """The name of a training run, or of an ensemble's (a+b), as any version gave it, without `unused_settings`."""
    return _OLDER_NAME.sub(lambda part: f"h-1{part[1]}{part[2] * ('-paced-by-self' in part[3])}{part[3]}", run)
