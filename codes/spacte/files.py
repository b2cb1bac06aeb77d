"""Files that are never half written, folders, locks."""

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from spacte.utils import TakenError, UserError


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents; UserError if this is not possible or nothing can be written there."""
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

    TakenError `taken` if another process holds the lock, or UserError if the file cannot be written. Where the
    filesystem has no locks, a warning says so, once.
    """
    import fcntl  # not on Windows, where logs can be read

    try:
        held = open(path, "a+")  # noqa: SIM115 - the caller's; NFS shares a lock of what is open for reading
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

    Files that killed processes left half written there are removed. Raises UserError if it cannot be written.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        remove_leftovers(path.parent)
        with open(temporary, "wb") as file:
            # the name of a file may be any bytes
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never there
            temporary.unlink()


_PID_NAMESPACE = Path("/proc/self/ns/pid")  # two containers of one host name may number their processes separately
_HOST = hashlib.sha256(
    f"{platform.node()}{_PID_NAMESPACE.is_symlink() and os.readlink(_PID_NAMESPACE)}".encode()
).hexdigest()[:8]
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


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_ending(path: Path, endings: tuple[str, ...]) -> None:
    """UserError if the path has none of the endings."""
    if path.suffix not in endings:
        raise UserError(f"'{path}' must end in {', '.join(endings)}")
