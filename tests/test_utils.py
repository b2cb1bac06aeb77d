"""What every part needs: the exit codes of its errors."""

import errno

import pytest

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
