"""The record of the code that ran."""

import re
import subprocess

from conftest import load_file


def test_the_state_of_the_source_is_that_of_the_library_and_the_defence(tmp_path):
    """In a checkout of its own: what is no source does not count, a module that git does not know does."""
    library, defence = tmp_path / "codes/spacte", tmp_path / "codes/0Mine"
    for folder in (library, defence):
        folder.mkdir(parents=True)
        (folder / "train.py").write_text("")
    (defence / "spacte").symlink_to(library)
    copied = load_file("spacte/provenance.py", defence / "spacte" / "source.py")  # as a defence's train.py sees it
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
