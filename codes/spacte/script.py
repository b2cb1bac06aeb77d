"""What every script imports first: Ctrl-C while the rest is imported, which takes seconds, ends it with one line.

An interrupt raised inside a library's import may be swallowed there, or leave the library half imported, so none is.
"""

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    print(f"{sys.argv[0].rsplit('/', 1)[-1]}: interrupted before it began", file=sys.stderr, flush=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # so that a shell sees what it was ended by


def begin() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background a shell lets it be ignored
    signal.signal(signal.SIGINT, _end)
