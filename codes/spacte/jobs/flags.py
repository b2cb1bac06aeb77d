"""The flags of a queue's jobs, checked before the first of them begins: otherwise a wrong one shows when its job's turn
comes, or after its training, perhaps days later.

jobs -> the flags of their scripts -> what these say (spacte.refusals), in a process per defence's folder
"""

import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from spacte.jobs.job import Job, is_finished
from spacte.processes import end_with_parent
from spacte.utils import UserError


def check_flags(jobs: Sequence[Job]) -> None:
    """UserError, with what the script says, if train.py or certify_mhead.py would refuse an unfinished job's flags.

    Files and devices that flags name are not looked at, since they may come later. Scripts that do not parse their
    flags with this library are skipped; one that cannot be imported is named in a warning.
    """
    by_folder: dict[Path, dict[tuple[str, ...], Job]] = {}
    for job in itertools.filterfalse(is_finished, jobs):
        for script, flags in (("train.py", job.train), ("certify_mhead.py", job.certify)):
            if flags is not None and _is_ours(job.scripts / script):
                by_folder.setdefault(job.scripts, {}).setdefault((script, *flags), job)
    children = {folder: _start_child(folder) for folder in by_folder}
    for folder, child in children.items():
        out, err = child.communicate(json.dumps(list(by_folder[folder])))
        if child.returncode:
            reason = (err.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            warnings.warn(f"the flags of '{folder}' could not be checked: {reason}", stacklevel=1)
            continue
        for job, refusal in zip(by_folder[folder].values(), json.loads(out), strict=True):
            if refusal:
                raise UserError(f"run '{job.run_name}': {refusal}")


def _start_child(folder: Path) -> subprocess.Popen[str]:
    """A process that reads commands (a script's name and its flags) and prints what each script says against them."""
    return subprocess.Popen(
        [sys.executable, "-m", "spacte.refusals"],
        cwd=folder,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=end_with_parent,
    )


def _is_ours(script: Path) -> bool:
    """Whether the script reads its flags by this library."""
    try:
        return f"spacte.{script.stem.partition('_')[0]}" in script.read_text(encoding="utf-8")
    except (OSError, ValueError):  # its jobs will say so
        return False
