"""What every script imports first."""

import os
import signal
import sys
from pathlib import Path

import pytest
from children import CODES, run

SCRIPTS = sorted(
    path
    for pattern in ("*.py", "[0-9]*/train.py", "bench/*.py", "studies/*.py", "examples/*.py")
    for path in CODES.glob(pattern)
    if "__main__" in path.read_text()
)


@pytest.mark.parametrize("script", [*map(str, SCRIPTS), "-c"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, script):
    """Imports take seconds; here, one of them is interrupted as soon as it begins. "-c": an installed command."""
    command = [sys.executable, script, *["import spacte.commands as commands; commands.report()"] * (script == "-c")]
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    ended = run(command, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{CODES}"})
    assert ended.returncode == -signal.SIGINT
    assert (ended.stdout, ended.stderr) == ("", f"{Path(script).name}: interrupted before it began\n")


def test_garbage_is_collected_once_a_script_begins():
    """Not while it imports; what the imports have made is left alone."""
    body = "cli.run(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))"
    code = f"import gc, spacte.script; print(gc.isenabled()); from spacte import cli; {body}"
    ended = run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(CODES)})
    assert ended.stdout == "False\nTrue True\n", ended.stderr


def test_a_program_that_imports_a_script_stays_as_it_is():
    """Its garbage is collected, and Ctrl-C its own."""
    code = "import gc, signal, train; print(gc.isenabled(), signal.getsignal(signal.SIGINT).__name__)"
    ended = run([sys.executable, "-c", code], cwd=CODES / "0Gaussian")
    assert ended.stdout == "True default_int_handler\n", ended.stderr
