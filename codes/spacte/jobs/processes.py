"""Commands in processes of their own, which end with the program that started them."""

import os

from spacte.utils import end_with_parent


def set_priority_and_end(nice: int = 0) -> None:
    """For Popen's preexec_fn: the command is nicer than its parent by `nice` and, on Linux, ends with it."""
    os.nice(nice)
    end_with_parent()
