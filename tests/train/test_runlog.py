"""A training run's text log: whose it is, and what a resumed run does with it."""

import math
import shutil

import pytest
from conftest import full_disk

from spacte.train.runlog import TrainingLog, TrainingPaths
from spacte.utils import UserError


def run_log(tmp_path, name, epochs_done=0, text=""):
    """The log of a run with its own checkpoints and with the name, and so the logs, of all others."""
    paths = TrainingPaths(tmp_path / name, tmp_path / "runs", tmp_path / "logs" / "x-train.log")
    paths.make_folders()
    return TrainingLog(paths, 3, epochs_done, text)


def log_epoch(log, epoch):
    figures = {"loss": 1.5, "lr": 0.1, "lambda": 2.0, "acc": math.nan, "images_per_second": 9.0}
    log.write({"epoch": epoch} | figures | {"left": ""})


def log_epochs(log, *epochs):
    """Log these epochs, and end as a killed process does."""
    for epoch in epochs:
        log_epoch(log, epoch)
    if log.tensorboard is not None:
        log.tensorboard.close()
    log._file.close()
    log._lock.close()
    return log.text


def test_the_newest_checkpoint_is_that_of_the_largest_epoch(tmp_path):
    for epoch in (9, 10):
        (tmp_path / f"epoch{epoch}.pth").touch()
    assert TrainingPaths(tmp_path, tmp_path / "runs", tmp_path / "x-train.log").epochs() == [10, 9]


def test_a_resumed_run_ends_its_own_log(tmp_path):
    """What was logged after its last checkpoint is logged again; a log that is gone or cut is written again."""
    path = tmp_path / "logs" / "x-train.log"
    whole = log_epochs(run_log(tmp_path, "a"), 1, 2, 3)
    assert [line.split("\t")[0] for line in whole.splitlines()] == ["epoch", "1", "2", "3"]
    kept = whole[: whole.index("\n2\t") + 1]
    for there in (whole, kept, kept[:-3], ""):
        path.write_text(there)
        assert log_epochs(run_log(tmp_path, "a", 1, kept), 2, 3) == whole == path.read_text()
    assert len(list(path.parent.iterdir())) == 1


def test_a_resumed_run_spares_the_log_of_another(tmp_path):
    path = tmp_path / "logs" / "x-train.log"
    first = log_epochs(run_log(tmp_path, "a"), 1)
    other = log_epochs(run_log(tmp_path, "b"), 1, 2, 3).replace("1.5", "2.5")
    path.write_text(other)
    whole = log_epochs(run_log(tmp_path, "a", 1, first), 2)
    assert path.read_text() == whole and whole.startswith(first)
    assert [path.with_name(f"{path.name}.{k}").read_text() for k in (1, 2)] == [first, other]


def test_two_runs_do_not_write_one_log(tmp_path):
    log = run_log(tmp_path, "a")
    with pytest.raises(UserError, match=r"another process is writing '.*x-train.log': give another --logs_dir"):
        run_log(tmp_path, "b")
    log_epochs(log, 1)
    log_epochs(run_log(tmp_path, "b"), 1)


def test_training_goes_on_where_tensorboard_cannot_write(tmp_path):
    log = run_log(tmp_path, "a")
    log_epoch(log, 1)
    shutil.rmtree(tmp_path / "runs")
    with pytest.warns(UserWarning, match=r"^TensorBoard shows nothing more; training continues: .*No such file"):
        log_epoch(log, 2)
    assert log_epochs(log, 3).count("\n") == 4 and not (tmp_path / "runs").exists()


def test_training_begins_where_tensorboard_cannot_write(tmp_path):
    with full_disk(limit=20), pytest.warns(UserWarning, match=r"^TensorBoard shows nothing more.*File too large"):
        log = run_log(tmp_path, "a")
    assert log_epochs(log, 1, 2).count("\n") == 3


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".epoch1.pth.17.tmp").write_bytes(b"x")
    log_epochs(run_log(tmp_path, "a"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["lock"]
