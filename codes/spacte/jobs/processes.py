"""Commands in processes of their own, which end with the program that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_C_LIBRARY = ctypes.CDLL(None)  # loaded here, because nothing should be between fork and exec


def set_priority_and_end(nice: int = 0) -> None:
    """For Popen's preexec_fn: the command is nicer than its parent by `nice` and, on Linux, ends with it."""
    os.nice(nice)
    if sys.platform == "linux":
        _C_LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
