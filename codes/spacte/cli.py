"""Command lines: flags that say what is legal, one line for a user's error, clean ends."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar, cast

from spacte.utils import RunError, UserError

T = TypeVar("T")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # of a folder on the network: the same command may work later


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, flags cannot be abbreviated, and --help tells their defaults."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; of a flag that is unknown, the nearest one is named."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        flags = [flag for flag in self._option_string_actions if flag not in ("-h", "--help")]
        name = "--" + unknown[1][2:].replace("-", "_") if unknown else ""
        near = difflib.get_close_matches(name, flags, n=1)
        advice = f"did you mean {near[0]}? See --help" if near else "see --help"
        self.exit(2, f"{self.prog}: error: {message} ({advice})\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """The flag's help, and its default where it has one."""
        without = action.nargs == 0 or any(
            action.default is nothing for nothing in (None, False, (), argparse.SUPPRESS)
        )
        return str(action.help) if without else f"{action.help} (default: %(default)s)"


def _number(kind: Callable[[str], float], legal: str, accept: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        """The number; argparse's error, with what is legal, where it is not one."""
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"'{text}' must be {legal}")
        return value

    return parse


def check_settings(parser: Parser, given: dict) -> dict:
    """Settings by name, each as the parser's flag of that name would hold it, for those who call from Python.

    Raises UserError with the legal values where one is not legal.
    """
    flags = {flag.dest: flag for flag in parser._actions}
    return {name: _check_setting(name, value, flags[name]) for name, value in given.items()}


def _check_setting(name: str, value: Any, flag: argparse.Action) -> Any:
    """A setting's value, or its list of values, as the flag would hold it."""
    if value is None:
        if flag.default is not None:
            raise UserError(f"{name}: None is not a value; leave it out for {flag.default}")
        return None
    kind, choices = cast(Callable[[str], Any] | None, flag.type), flag.choices or ()
    if flag.nargs == "+":
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise UserError(f"{name}: it is empty; leave it out for the default")
        return [parse_value(name, one, kind, choices) for one in values]
    if isinstance(value, list | tuple):
        raise UserError(f"{name}: give one value, not {len(value)}")
    if flag.nargs != 0:
        return parse_value(name, value, kind, choices)
    if value not in (True, False):  # of a switch
        raise UserError(f"{name}: '{value}' must be one of True, False")
    return bool(value)


def parse_value(name: str, value: Any, kind: Callable[[str], Any] | None, choices: Iterable = ()) -> Any:
    """A setting's value as a flag of that kind would parse it from text. UserError, with what is legal, if not."""
    if kind is None and not isinstance(value, str):
        raise UserError(f"{name}: '{value}' must be text")
    try:
        found = value if kind is None else kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from error
    if choices and found not in choices:
        raise UserError(f"{name}: '{value}' must be one of {', '.join(map(str, choices))}")
    return found


def settings_of(kind: type[T], args: argparse.Namespace) -> T:
    """The settings (a dataclass) whose fields are flags of the same names."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cast(Any, kind))})


def defaults_of(kind: Any) -> dict[str, Any]:
    """A settings dataclass's defaults by name, of the fields that have one: the flags' too, so that they stand once."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}


def _fraction(text: str) -> float:
    """0.5, or 2/255. ValueError for anything else."""
    above, bar, below = text.partition("/")
    if bar and not float(below):
        raise ValueError("a fraction of 0")
    return float(above) / float(below) if bar else float(above)


_INFINITY = float("inf")
_LARGEST = 10**15  # of an integer: doubles hold it, and what is computed from it
positive_int = _number(int, "an integer of at least 1, at most 10^15", lambda value: 1 <= value <= _LARGEST)
non_negative_int = _number(int, "an integer of at least 0, at most 10^15", lambda value: 0 <= value <= _LARGEST)
positive_float = _number(float, "a number above 0", lambda value: 0 < value < _INFINITY)
non_negative_float = _number(float, "a number of at least 0", lambda value: 0 <= value < _INFINITY)
radius = _number(_fraction, "a number of at least 0, or a fraction like 2/255", lambda value: 0 <= value < _INFINITY)
pace = _number(float, "a number from 0 to 300", lambda value: 0 <= value <= 300)  # 10^-300 is still a double
probability = _number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
share = _number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
# of a sigma or an attack; the authors of some bases count in units of 1/256
image_norm = _number(float, "above 0 and below 64, in units of [0, 1] and not of 1/256", lambda value: 0 < value < 64)
seed = _number(int, "an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
open_probability = _number(float, "above 0 and below 1", lambda value: 0 < value < 1)


def run_with_settings(parser: Parser, function: Callable[..., None], *kinds: type) -> None:
    """Run a script whose `function` takes settings of these kinds, one after the other, from the flags: see `run`."""

    def command() -> None:
        args = parser.parse_args()
        function(*(settings_of(kind, args) for kind in kinds))

    run(command)


def run(command: Callable[[], None]) -> None:
    """Run a script's body. A UserError prints one line on stderr and exits with code 2; a warning is one line,
    said once.

    A TakenError exits with 75: the same command may be tried later. A RunError, which the user did not cause (a loss
    that is not finite, say), prints one line and exits with code 1; Ctrl-C exits with 130. Where stdout or stderr are
    closed, or on a full disk, the exit code alone tells.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good
    said = functools.cache(lambda text: _say(f"warning: {text}"))
    warnings.showwarning = lambda message, *where: said(str(message))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks becomes a question mark
    try:
        if "spacte.script" in sys.modules:  # not where another program calls
            sys.modules["spacte.script"].begin()
        command()
        sys.stdout.flush()
    except UserError as error:
        _stop(f"error: {error}", error.exit_code)
    except RunError as error:
        _stop(f"stopped: {error}", error.exit_code)
    except BrokenPipeError:  # `| head` has read enough
        _leave(1)
    except OSError as error:  # that nothing else has handled: no space, a name too long, a folder that is gone
        if error.filename is not None:
            code = RunError.exit_code if error.errno in _TRANSIENT else UserError.exit_code
            _stop(f"error: '{os.fsdecode(error.filename)}': {error.strerror}", code)
        if error.errno in _NO_SPACE:  # of a file that is open already, stdout say
            _stop(f"error: {error.strerror}", UserError.exit_code)
        _unexpected(error)
    except KeyboardInterrupt:
        _stop("interrupted; the files on disk are complete", 130)
    except Exception as error:
        _unexpected(error)


def _unexpected(error: Exception) -> NoReturn:
    """Print the traceback of an unhandled error, or one line if the GPU ran out of memory."""
    if "torch" in sys.modules and (line := _of_short_memory(error)):  # not every script imports torch
        _stop(line, 1)
    if not _is_one_of_several():
        raise error
    traceback.print_exc()
    _leave(1)


def _of_short_memory(error: Exception) -> str:
    """What to say where a GPU's memory did not suffice; nothing of another error."""
    from spacte.device import NO_ENGINE, memory_is_short

    if not memory_is_short(error):
        return ""
    or_else = "; or cuDNN has no kernel for it: choose another --precision" * (NO_ENGINE in str(error))
    return f"stopped: the GPU's memory is too small for this: give a smaller --batch_size{or_else}"


def _stop(message: str, code: int) -> NoReturn:
    _say(message)
    _leave(code)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, a pipe that nobody reads: what is left would become an error again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if _is_one_of_several():  # a clean end would wait for processes that wait for this one; torchrun ends them
        os._exit(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    distributed = sys.modules.get("spacte.distributed")
    return distributed is not None and distributed.get_world_size() > 1


def _say(message: str) -> None:
    name = sys.argv[0].rsplit("/", 1)[-1]
    with contextlib.suppress(OSError, ValueError):
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
