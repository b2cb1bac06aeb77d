"""The end of a process with the one that started it, and the priority of a command."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a fork's child should not load


def end_with_parent() -> None:
    """From now on this process ends with the one that started it, by SIGTERM; on Linux alone."""
    if _C_LIBRARY is not None:
        _C_LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def set_priority_and_end(nice: int = 0) -> None:
    """For Popen's preexec_fn: the command is nicer than its parent by `nice` and, on Linux, ends with it."""
    os.nice(nice)
    end_with_parent()
