"""What every script imports first, since the rest takes seconds: Ctrl-C in between ends it with one line.

An interrupt raised inside a library's import may be swallowed there, or leave the library half imported, so none is.
Imports make 300,000 objects that stay. Python's collector would go through them again and again while they are
made, and once more at the end: it is off until they are there, and leaves them alone thereafter. That saves a command
that imports torch 3 of its 9 seconds or so.
"""

import gc
import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    print(f"{sys.argv[0].rsplit('/', 1)[-1]}: interrupted before it began", file=sys.stderr, flush=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # so that a shell sees what it was ended by


def begin() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, and garbage is collected."""
    gc.enable()
    if not gc.get_freeze_count():
        gc.freeze()
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


gc.disable()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background a shell lets it be ignored
    signal.signal(signal.SIGINT, _end)
