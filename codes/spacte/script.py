"""What every script imports first: Ctrl-C while the rest is imported, which takes seconds, is one line, too."""

import sys
from types import TracebackType

INTERRUPTED = "interrupted; what is on disk is whole"


def say(message: str) -> None:
    """A line on stderr, under the script's name."""
    name = sys.argv[0].rsplit("/", 1)[-1]
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)


def _report(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Python's report of an exception that nobody has caught, but for Ctrl-C, whose exit code stays that of SIGINT."""
    if issubclass(kind, KeyboardInterrupt):
        say(INTERRUPTED)
    else:
        sys.__excepthook__(kind, error, where)


sys.excepthook = _report
