"""Which code runs: the hash of its source, its commit, the versions of what it stands on."""

import contextlib
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCE_FIELDS = ("source_sha256", "commit", "dirty")  # of `source_state`
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "statsmodels", "pandas", "scikit-learn")
_DECIDE_VOTES = ("torch", "torchvision", "numpy", "scipy")


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
