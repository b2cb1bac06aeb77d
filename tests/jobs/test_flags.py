"""Flags that a script would refuse are found before the first job begins."""

import pytest
from conftest import CODES

REAL = """
[defaults]
seeds = [1]
train = "--dataset digits --arch R8 --epochs 1 --device cpu"
certify = "--N 100 --device cpu"
[[run]]
label = "learns-votes"
defence = "5CATRS"
train = "--lbd 1 --pretrained_model WORK/a/later/seed-1/epoch1.pth"
certify = "--sequential --radii 0.5"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "--epochs 1",
            "--epoch 1",
            "train.py: error: unrecognized arguments: --epoch 1 (did you mean --epochs?",
        ),
        ("--arch R8", "--num_heads 1 --whole_gradient", "train.py: error: --whole_gradient: one head has its whole"),
        ("--lbd 1", "--lbd -1", "train.py: error: argument --lbd: '-1' must be a number"),
        ("--sequential", "", "certify_mhead.py: error: --radii says when to stop: it needs"),
    ],
)
def test_a_wrong_flag_ends_the_queue_before_it_begins(script, tmp_path, old, new, message):
    (tmp_path / "queue.toml").write_text(REAL.replace(old, new))
    code, out, err = script("experiments.py", "queue.toml", "--work", "work")
    assert (
        (code, out) == (2, "")
        and err.startswith("experiments.py: error: run '5CATRS/learns-votes': ")
        and message in err
    )
    assert err.count("\n") == 1 and not (tmp_path / "work").exists()


def test_files_that_flags_name_may_come_later(script, tmp_path):
    (tmp_path / "queue.toml").write_text(REAL)
    code, out, err = script("experiments.py", "queue.toml", "--work", "work", "--commands")
    assert (code, out.count("\n"), err) == (0, 1, "")


def test_a_script_that_cannot_be_imported_is_a_warning_and_another_parser_is_left_alone(queue, stub):
    """Its jobs tell by themselves, and the others go on."""
    text = '[defaults]\nseeds = [1]\ntrain = "--epochs 1"\n[[run]]\nlabel = "a"\ndefence = "0Stub"\n'
    assert queue(text, "--commands")[::2] == (0, "")
    train = stub.parent / "0Stub" / "train.py"
    train.write_text("import missing_module\nfrom spacte.train import command\n" + train.read_text())
    (train.parent / "spacte").symlink_to(CODES / "spacte")
    code, out, err = queue(text, "--commands")
    assert code == 0 and out.count("\n") == 1 and err.count("\n") == 1
    assert f"the flags of '{train.parent}' could not be checked: ModuleNotFoundError: No module named 'missing" in err
