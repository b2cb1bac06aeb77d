"""The queue file: what is wrong in it is one line, what a run needs of another comes first."""

import re

import pytest
from stand_ins import JOBS, QUEUE, said

from spacte.jobs.queue_file import read_queue


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[defaults]", "[defaults", "'queue.toml' is not a readable TOML file"),
        ("[defaults]", "[default]", "unknown key 'default'; there are defaults, run, ensemble"),
        ("seeds =", "seed =", "'queue.toml', defaults: unknown key 'seed'; there are seeds, train, certify"),
        ('label = "one"', 'name = "one"', "unknown key 'name'; there are label, defence, seeds, train, certify, after"),
        ('label = "one"', "", "run '': its label is missing"),
        ('label = "one"', 'label = "../one"', "a label is the name of a folder"),
        ('label = "one"', 'label = "five"', "run 'five': the label is taken; there are five"),
        ('label = "both"', 'label = "one"', "ensemble 'one': the label is taken; there are five, one"),
        ('label = "one"', "label = 1", "label must be a string"),
        ("1Stub", "Stub", "defence 'Stub' must be one of 0Stub, 1Stub"),
        ("[1, 2]", "[]", "seeds must be integers of at least 0, one or more, each once; they are []"),
        ("[1, 2]", "[1, 1]", "each once; they are [1, 1]"),
        ("[1, 2]", "[true]", "seeds must be integers"),
        ('"--N 100"', "true", "certify must be a string"),
        (
            "--N 100",
            "--logs_dir x",
            "certify must not hold --logs_dir: the queue sets --model_path, --logs_dir",
        ),
        ("--num_heads 5", "--num_heads 5 --seed=3", "run 'five': train must not hold --seed: the queue sets"),
        ("--num_heads 5", "num_heads 5", "must begin with a flag, --..."),
        ("--num_heads 5", "--num_heads '5", "No closing quotation"),
        ('of = "one"', 'of = "two"', "of = 'two' must be the label of a run: five, one"),
        (
            'of = "one"',
            'of = "one"\nseeds = [[1, 2], [3]]',
            "of its run (1, 2), each list an ensemble in which no seed",
        ),
        ('of = "one"', 'of = "one"\nseeds = [1]', "ensemble 'both': seeds must be lists of seeds of its run (1, 2)"),
        ('of = "one"', 'of = "one"\nseeds = [[2, 2]]', "in which no seed comes twice; one is [2, 2]"),
        ('of = "one"', 'of = "one"\nseeds = []', "ensemble 'both': seeds is empty"),
        ('of = "one"', 'of = "one"\nseeds = [[1, 2], [2, 1]]', "two of its lists of seeds are one ensemble, [2, 1]"),
        (QUEUE, "[defaults]", "has no [[run]]"),
        (QUEUE, "run = [1]", "run must be tables, [[run]]"),
    ],
)
def test_a_bad_queue_file_is_one_line(queue, work, old, new, message):
    code, out, err = queue(QUEUE.replace(old, new))
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err and "queue.toml" in err
    assert not work.exists()


def test_runs_are_certified_or_not_as_they_say_or_else_the_defaults(stub, tmp_path):
    text = QUEUE.replace('certify = "--N 100"', "certify = false").replace('"1Stub"', '"1Stub"\ncertify = "--N 5"', 1)
    (tmp_path / "queue.toml").write_text(text)
    jobs = {job.run_name: job.certify for job in read_queue(tmp_path / "queue.toml", stub.parent, tmp_path, "seeds")}
    assert jobs == {"0Stub/five": None, "1Stub/one": ("--N", "5"), "1Stub/both": ()}


def test_a_work_folder_in_the_checkout_is_refused(script, stub, tmp_path):
    (tmp_path / "queue.toml").write_text(QUEUE)
    inside = tmp_path / "that's a checkout" / "work"
    code, _, err = script(stub, "queue.toml", "--work", inside)
    assert code == 2 and err.count("\n") == 1 and "give a folder outside it" in err and not inside.exists()


def test_a_missing_queue_file_is_one_line(script, tmp_path):
    code, _, err = script("experiments.py", "none.toml", "--work", "work")
    assert (
        code == 2
        and err == "experiments.py: error: 'none.toml' is not a readable TOML file: No such file or directory\n"
    )


# --- what needs what ---

LEFT = "WORK/1Stub/one/seed-1/save/x WORK/1Stub/one/seed-2/save/x"
NEEDING = QUEUE.replace('train = "--num_heads 5"', f'after = "one"\ntrain = "--num_heads 5 --pretrained {LEFT}"')


def test_what_a_run_needs_comes_first_and_is_waited_for(queue, work):
    code, out, _ = queue(NEEDING, "--processes", 3)
    one, five = ([f"{run}/seed-{seed}" for seed in (1, 2)] for run in ("1Stub/one", "0Stub/five"))
    assert code == 0 and said(out, "started") == [*one, *five, "1Stub/both"]
    assert max(out.index(f"finished {job}") for job in one) < min(out.index(f"started  {job}") for job in five)
    assert (
        f"--pretrained '{work}/1Stub/one/seed-1/save/x' '{work}/1Stub/one/seed-2/save/x'"
        in (work / five[0] / "output.txt").read_text()
    )
    listed = queue(NEEDING, "--commands")[1]
    assert re.findall(r"--job (\S+)$", listed, re.MULTILINE) == [one[0], one[1], five[0], five[1], "1Stub/both"]


def test_a_run_needs_the_seeds_that_its_flags_name_or_all(queue):
    def order(text):
        return re.findall(r"--job (\S+)$", queue(text, "--commands")[1], re.MULTILINE)

    one, both = ([f"{run}/seed-{seed}" for seed in (1, 2)] for run in ("1Stub/one", "0Stub/five"))
    second = NEEDING.replace("WORK/1Stub/one/seed-1/save/x ", "")
    assert order(second) == [one[1], both[0], one[0], both[1], "1Stub/both"]
    assert order(NEEDING.replace(LEFT, "x"))[:2] == one


def test_a_job_alone_is_refused_until_what_it_needs_is_finished(queue):
    code, _, err = queue(NEEDING, "--job", JOBS[0])
    assert code == 75 and err.endswith(f"{JOBS[0]} needs 1Stub/one/seed-1, which is not finished\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('after = "one"', "", "run 'five': its train flags name WORK/1Stub/one: give it after = \"one\""),
        ('after = "one"', 'after = ["one", "two"]', "after = 'two' must be the label of another run, no ensemble: one"),
        ('after = "one"', "after = [[]]", "after = '[]' must be the label of another run"),
        ('after = "one"', "after = 1", "after must be a label or a list of labels"),
        ('label = "one"', 'label = "one"\nafter = ["five"]', "is circular: five after one after five"),
        ('after = "one"', 'after = "five"', "after = 'five' must be the label of another run, no ensemble: one"),
        ('after = "one"', 'after = "both"', "after = 'both' must be the label of another run, no ensemble: one"),
        ("/seed-2/save", "/seed-3/save", "name WORK/1Stub/one/seed-3; there are 1Stub/one/seed-1, 1Stub/one/seed-2"),
    ],
)
def test_a_need_that_cannot_be_is_one_line(queue, work, old, new, message):
    code, out, err = queue(NEEDING.replace(old, new))
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err and not work.exists()
