"""How a job stands on disk: finished or not with today's flags, what it has left, what it resumes from."""

import json
import shutil

import pytest
from conftest import CODES
from stand_ins import JOBS, QUEUE, epochs, said

from spacte.jobs.job import Job, last_checkpoint, left_on_disk, remove_old_checkpoints, train_command


@pytest.mark.parametrize("change", [("--num_heads 5", "--num_heads 1"), ("--N 100", "--N 200")])
def test_a_job_is_not_gone_on_with_under_other_flags(queue, change):
    """Neither an older network is certified nor an older log kept as the new flags' one."""
    queue(QUEUE)
    code, out, _ = queue(QUEUE.replace(*change), "--job", JOBS[0])
    assert code == 1 and f"({change[0].split()[0]}: " in out
    assert "5 of them finished" in queue(QUEUE)[1], "changed back"


def test_an_ensemble_is_not_finished_once_its_members_are_trained_otherwise(queue, work):
    queue(QUEUE)
    other = QUEUE.replace('defence = "1Stub"', 'defence = "1Stub"\ntrain = "--wd 0.1"')
    for seed in (1, 2):
        shutil.rmtree(work / f"1Stub/one/seed-{seed}")
    code, out, _ = queue(other)
    assert code == 1 and said(out, "finished") == ["1Stub/one/seed-1", "1Stub/one/seed-2"]
    assert "the train flags of 1Stub/one/seed-1 have changed (--wd: not given before, 0.1 now)" in out
    shutil.rmtree(work / "1Stub/both")
    assert said(queue(other)[1], "finished") == ["1Stub/both"]


def test_a_job_is_not_finished_once_what_it_comes_after_is_trained_otherwise(queue, work):
    """What it took from the older training is not taken for the newer one's, through any number of jobs."""
    chain = QUEUE.replace('label = "five"', 'label = "five"\nafter = "one"')
    chain += '[[run]]\nlabel = "last"\ndefence = "0Stub"\nafter = "five"\n'
    assert queue(chain)[0] == 0
    shutil.rmtree(work / "1Stub")
    code, out, _ = queue(chain.replace('defence = "1Stub"', 'defence = "1Stub"\ntrain = "--wd 0.1"'))
    assert code == 1 and said(out, "finished") == ["1Stub/one/seed-1", "1Stub/one/seed-2", "1Stub/both"]
    assert out.count("five/seed-1: the train flags of 1Stub/one/seed-1 have changed (--wd: not given before") == 1
    shutil.rmtree(work / "0Stub/five")
    code, out, _ = queue(chain.replace('defence = "1Stub"', 'defence = "1Stub"\ntrain = "--wd 0.1"'))
    assert code == 1 and said(out, "finished") == ["0Stub/five/seed-1", "0Stub/five/seed-2"]
    assert "0Stub/last/seed-2: the train flags of 1Stub/one/seed-1 have changed" in out, "through another job"


def test_what_a_job_comes_after_may_move_or_get_a_seed_and_older_records_do_not_tell(queue, work):
    chain = QUEUE.replace('label = "five"', 'label = "five"\nafter = "one"')
    assert queue(chain)[0] == 0
    for record in work.glob("0Stub/*/*/job.json"):
        noted = json.loads(record.read_text())
        assert noted.pop("after") and not noted["members"]
        if "seed-1" in str(record):
            record.write_text(json.dumps(noted))
    more = chain.replace('defence = "1Stub"', 'defence = "1Stub"\nseeds = [1, 2, 3]\ntrain = "--workers 3"')
    code, out, _ = queue(more)
    assert code == 0 and not [name for name in said(out, "started") if name.startswith("0Stub")], out
    assert "1Stub/one/seed-3" in said(out, "finished")


def test_votes_in_the_usual_folder_are_progress_too(tmp_path):
    """CAT-RS counts its base classifier's votes before its first checkpoint, without --votes_dir in ./votes."""
    job = Job("5CATRS/catrs/seed-1", tmp_path, tmp_path / "work", 1, ("--epochs", "3"), None)
    counts = tmp_path / "5CATRS" / "votes" / "counts.jsonl"
    counts.parent.mkdir(parents=True)
    counts.write_text("one line\n")
    assert left_on_disk(job) == {counts: 9}


def test_a_job_whose_train_flags_have_changed_is_not_gone_on_with(queue, work):
    queue(QUEUE)
    before = epochs(work)
    code, out, _ = queue(QUEUE.replace("--num_heads 5", "--num_heads 1"))
    assert code == 1 and said(out, "failed") == ["0Stub/five/seed-1", "0Stub/five/seed-2"]
    assert "(--num_heads: 5 before, 1 now)" in out and epochs(work) == before
    assert "5 of them finished" in queue(QUEUE)[1], "changed back"


def test_a_job_goes_on_on_another_device(queue):
    queue(QUEUE)
    code, out, _ = queue(QUEUE.replace("--num_heads 5", "--num_heads 5 --device cuda"))
    assert code == 0 and said(out, "finished") == ["0Stub/five/seed-1", "0Stub/five/seed-2"]


def test_what_a_job_has_left_is_found_under_its_older_name_and_under_todays(tmp_path):
    folder, older_name = tmp_path / "0Stub/one/seed-1/save", "h-1-eps-0.8-m-2-lbdlast-1.2-images-9"
    older, today = folder / older_name, folder / "h-1-m-2-images-9"
    train = ("--teachers", f"WORK/0Stub/one/seed-1/save/{older_name}/epoch1.pth")
    job = Job("0Stub/two/seed-1", CODES, tmp_path, 1, train, None)
    assert train_command(job)[3] == str(today / "epoch1.pth")
    older.mkdir(parents=True)
    (older / "epoch1.pth").touch()
    assert train_command(job)[3] == str(older / "epoch1.pth"), "a queue that an older version began"


def test_the_last_checkpoint_is_that_of_the_largest_epoch_and_is_kept(tmp_path):
    job, folder = Job("0Stub/one/seed-1", CODES, tmp_path, 1, (), None), tmp_path / "0Stub/one/seed-1/save/d/a/n/run"
    folder.mkdir(parents=True)
    for epoch in (8, 9, 10):
        (folder / f"epoch{epoch}.pth").touch()
    remove_old_checkpoints(job, keep=2)
    assert last_checkpoint(job).name == "epoch10.pth" and not (folder / "epoch8.pth").exists()
