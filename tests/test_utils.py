"""What every part needs: the exit codes of its errors."""

import errno
import shlex
import sys
from pathlib import Path

import pytest
from children import CODES, run

from spacte import cli
from spacte.utils import RunError, TakenError, UserError


@pytest.mark.parametrize(
    ("kind", "code", "said"), [(UserError, 2, "error"), (TakenError, 75, "error"), (RunError, 1, "stopped")]
)
def test_the_exit_code_tells_what_to_mend_from_what_to_try_later(capsys, kind, code, said):
    def command():
        raise kind("why")

    with pytest.raises(SystemExit) as ended:
        cli.run(command)
    assert ended.value.code == code and capsys.readouterr().err.endswith(f": {said}: why\n")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EIO, 1), (errno.ESTALE, 1)])
def test_what_a_folder_on_the_network_refuses_may_work_later(capsys, number, code):
    def command():
        raise OSError(number, "why", "/nfs/x")

    with pytest.raises(SystemExit) as ended:
        cli.run(command)
    assert ended.value.code == code and capsys.readouterr().err.endswith(": error: '/nfs/x': why\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
@pytest.mark.parametrize(("body", "where", "code", "said"), [
    ("print(1)", ">&-", 0, ""),
    ("print(1)", ">/dev/full", 2, "-c: error: No space left on device\n"),
    ("raise_(TakenError('later'))", "2>/dev/full", 75, ""),
    ("raise_(TakenError('later'))", "2>&-", 75, ""),
])  # fmt: skip
def test_the_exit_code_holds_where_nothing_can_be_said(body, where, code, said):
    lines = "from spacte import cli\nfrom spacte.utils import TakenError\ndef raise_(error): raise error\n"
    script = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(f'{lines}cli.run(lambda: {body})')} {where}"
    ended = run(["sh", "-c", script], cwd=CODES)
    assert (ended.returncode, ended.stderr) == (code, said)


@pytest.mark.parametrize(
    ("error", "said"), [(OSError(errno.ENOSPC, "no space"), "error: no space"), (KeyError(), None)]
)
def test_what_nobody_has_looked_after(capsys, error, said):
    """A full disk behind an open file is a line; what may be a mistake of ours keeps its traceback."""

    def command():
        raise error

    with pytest.raises(SystemExit if said else KeyError):
        cli.run(command)
    assert capsys.readouterr().err.endswith(f": {said}\n" if said else "")
