"""Files that are never half written, and locks."""

import errno
import fcntl
import os
import subprocess
import warnings

import pytest

from spacte.files import lock, replace_file, temporary_name
from spacte.utils import TakenError, UserError


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    with lock(tmp_path / "x", "taken"), pytest.raises(TakenError, match=r"^taken$"):
        lock(tmp_path / "x", "taken")
    with lock(tmp_path / "x", "", shared=True) as held, lock(tmp_path / "x", "", shared=True):
        assert held.readable(), "NFS shares a lock of nothing else"
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
