"""What every part needs and none owns: errors for the user, parts of messages, seeds."""

import traceback
from collections.abc import Iterable
from pathlib import Path

import numpy as np


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

    torch's CPU generator keeps 32 bits of it, so that some two of 10,000 images share their noise with probability
    1 %. No certificate depends on that, since each is about one image.
    """
    words = [len(purpose), *purpose.encode()]
    for number in numbers:
        words += [number & 0xFFFFFFFF, number >> 32]
    return int(np.random.SeedSequence([len(words), *words]).generate_state(1, np.uint64)[0] >> 1)
