"""What train.py and certify_mhead.py say against flags, without running: for a process in a defence's folder.

[[script, flag, ...], ...] as JSON on stdin -> a line for each, empty where its flags are legal, as JSON on stdout
"""

import contextlib
import importlib
import io
import json
import sys

from spacte.utils import UserError


def _refusal(script: str, flags: list[str]) -> str:
    """What the script says against the flags; nothing where they are legal."""
    sys.argv[0] = script  # a parser's errors begin with it
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            (_parse_train if script == "train.py" else _parse_certify)(flags)
    except UserError as error:
        return f"{script}: error: {error}"
    except SystemExit:
        return said.getvalue().strip()
    return ""


def _parse_train(flags: list[str]) -> None:
    from spacte.train import command
    from spacte.train.objective import Objective

    own = vars(importlib.import_module("train")).values()
    kinds = [
        kind for kind in own if isinstance(kind, type) and issubclass(kind, Objective) and kind.__module__ == "train"
    ]
    if len(kinds) == 1:  # of several the script alone knows which it trains
        command.parse(kinds[0], "", flags)


def _parse_certify(flags: list[str]) -> None:
    from spacte import cli
    from spacte.certify.certify import CertifySettings, check_stopping, parser_of

    check_stopping(cli.settings_of(CertifySettings, parser_of("").parse_args([*flags, "--model_path", "its own"])))


def _main() -> None:
    import spacte.certify.certify  # noqa: F401 - before stdin is read: all folders' processes import at once

    print(json.dumps([_refusal(script, flags) for script, *flags in json.load(sys.stdin)]))


if __name__ == "__main__":
    _main()
