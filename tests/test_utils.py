"""What every part needs: locks, and the record of the code that ran."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from children import CODES, run
from conftest import load_file

from spacte import cli
from spacte.utils import RunError, TakenError, UserError, lock, replace_file, temporary_name


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    with lock(tmp_path / "x", "taken"), pytest.raises(TakenError, match=r"^taken$"):
        lock(tmp_path / "x", "taken")
    with lock(tmp_path / "x", "", shared=True), lock(tmp_path / "x", "", shared=True):
        pass
    with pytest.raises(UserError, match=r"cannot write '.*/no/x': No such file or directory"):
        lock(tmp_path / "no/x", "taken")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="the filesystem has no locks") as warned:
        with lock(tmp_path / "x", "taken") as file:
            file.write("x")
        warnings.simplefilter("default")  # as in a script
        lock(tmp_path / "y", "taken").close()
        lock(tmp_path / "z", "taken", shared=True).close()
    assert len(warned) == 2 and (tmp_path / "x").read_text() == "x"  # the first one here, and one of the others


def test_what_cannot_be_locked_for_another_reason_is_refused(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot lock '.*/x': Input/output error") as raised:
        lock(tmp_path / "x", "taken")
    assert raised.type is UserError


@pytest.mark.parametrize(
    ("kind", "code", "said"), [(UserError, 2, "error"), (TakenError, 75, "error"), (RunError, 1, "stopped")]
)
def test_the_exit_code_tells_what_to_mend_from_what_to_try_later(capsys, kind, code, said):
    def command():
        raise kind("why")

    with pytest.raises(SystemExit) as ended:
        cli.run(command)
    assert ended.value.code == code and capsys.readouterr().err.endswith(f": {said}: why\n")


def test_the_state_of_the_source_is_that_of_the_library_and_the_defence(tmp_path):
    """In a checkout of its own: what is no source does not count, a module that git does not know does."""
    library, defence = tmp_path / "codes/spacte", tmp_path / "codes/0Mine"
    for folder in (library, defence):
        folder.mkdir(parents=True)
        (folder / "train.py").write_text("")
    (defence / "spacte").symlink_to(library)
    copied = load_file("spacte/utils.py", defence / "spacte" / "utils.py")  # as a defence's train.py sees it
    assert copied.source_state(str(defence / "train.py"))["commit"] is None, "no checkout yet"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True, timeout=60)

    assert re.fullmatch(r"[0-9a-f]{40}", copied.source_state(str(defence / "train.py"))["commit"])

    def is_dirty():
        return copied.source_state(str(defence / "train.py"))["dirty"]

    (defence / "notes.txt").write_text("x")
    (tmp_path / "other.py").write_text("x")
    assert is_dirty() is False
    (defence / "rule.py").write_text("x")
    assert is_dirty() is True
    (defence / "rule.py").unlink()
    (library / "train.py").write_text("x = 1")
    assert is_dirty() is True


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    """As soon as another writes there; but not what one that lives, here or elsewhere, may still complete."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    own = temporary_name("x")
    host = own.split("-")[1].removesuffix(".tmp")
    elsewhere = f".x.{dead.pid}-{'0' * 8}.tmp"
    for name in (own, f".x.{dead.pid}-{host}", f".x.{dead.pid}-{host}.tmp", elsewhere, ".a.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".download.{dead.pid}-{host}.tmp" / "raw").mkdir(parents=True)
    replace_file(tmp_path / "y", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([own, f".x.{dead.pid}-{host}", elsewhere, ".a.tmp", "y"])
    os.utime(tmp_path / elsewhere, (0, 0))
    replace_file(tmp_path / "y", "whole")
    assert elsewhere not in os.listdir(tmp_path)


SCRIPTS = sorted(path for pattern in ("*.py", "[0-9]*/train.py", "examples/demo.py") for path in CODES.glob(pattern))


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
