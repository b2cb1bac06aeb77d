"""The queues in codes/queues and the commands in EXPERIMENTS.md: legal, and the same where they should be."""

import re
from collections import Counter

import pytest
from conftest import CODES, DEFENCES, ROOT, load_module

from spacte.jobs.job import flag_values, train_command
from spacte.jobs.queue_file import read_queue
from spacte.logs.certlog import average_certified_radius, read_log
from spacte.train.command import parse
from spacte.train.objective import Objective
from spacte.train.runlog import TrainingPaths


def test_the_digits_queue_is_the_matrix_of_its_page(tmp_path):
    jobs = read_queue(CODES / "queues" / "digits.toml", CODES, tmp_path, "seeds")
    assert len(jobs) == 33 and [job.seed for job in jobs[::6]] == [666, 1, 2, 3, 4, None]
    page = (ROOT / "logs_certification/digits/README.md").read_text()
    documented = re.findall(r"^python train.py (--dataset digits .*) --seed \$seed \$folders(.*)$", page, re.MULTILINE)
    assert len(documented) == 3
    for k, flags in enumerate(documented):
        wanted = flag_values(" ".join(flags).split()) | {"--save_freq": ["5"]}
        assert jobs[2 * k].settings()["train"] == wanted
        assert jobs[2 * k + 1].settings()["train"] == wanted | {"--num_heads": ["1"]}
        assert jobs[2 * k].name[0] == str(k) and len(jobs[30 + k].members) == 5
    assert all(job.certify == ("--N", "1000", "--device", "cpu") for job in jobs)


def test_the_digits_queue_of_the_further_defences_is_one_regime(tmp_path):
    """Each defence with five heads and one, as the digits' own queue but for what is the defence's; CAT-RS asks the
    network that the queue has trained before.
    """
    jobs = read_queue(CODES / "queues" / "digits-defences.toml", CODES, tmp_path, "seeds")
    first, runs = jobs[0], [job for job in jobs[1:] if not job.members]
    assert [len(job.members) for job in jobs[1 + len(runs) :]] == [5] * 5
    seeds = Counter(job.run_name for job in runs)
    assert seeds.pop("5CATRS/catrs-5-heads-no-teaching") == 2 and list(seeds.values()) == [5] * 10
    assert {job.scripts.name for job in runs} == {name for name in DEFENCES if int(name[0]) > 2}
    digits = read_queue(CODES / "queues" / "digits.toml", CODES, tmp_path, "seeds")[0].settings()
    for job in runs:
        kind = getattr(load_module(job.scripts.name, "train"), job.scripts.name[1:])
        recipe, place, own = parse(kind, "", train_command(job)[2:])
        kind(recipe, 10, **own)
        for name in ("dataset", "arch", "noise_sd", "lr_step_size", "lbdlast", "epochs"):
            assert str(getattr(recipe, name)) == digits["train"][f"--{name}"][0]
        assert job.settings()["certify"] == digits["certify"] and place.device == "cpu"
    recipe, place, _ = parse(Objective, "", train_command(first)[2:])
    asked = {flag_values(train_command(job)[2:])["--pretrained_model"][0] for job in runs if "5CATRS" in job.name}
    assert asked == {str(TrainingPaths.of(recipe, place, recipe.name).checkpoint(recipe.epochs))}


def _experiments():
    return (ROOT / "EXPERIMENTS.md").read_text()


def test_the_commands_of_the_further_bases_write_what_is_certified():
    """Each train.py line of their section is legal, and a certify_mhead.py line of it names its checkpoint."""
    section = _experiments().split("## CIFAR-10: the further bases")[1].split("## ")[0]
    certified, commands = re.findall(r"--model_path (\S+)", section), 0
    for part in re.split(r"^cd (?:codes|\.\.)/", section, flags=re.MULTILINE)[1:]:
        defence = part.split()[0]
        kind = getattr(load_module(defence, "train"), defence[1:])
        (defaults,) = re.findall(r"main\(\w+, __doc__, (.*)\)", (CODES / defence / "train.py").read_text())
        defaults = eval(f"dict({defaults})")
        for flags in re.findall(r"^python train.py (.*)$", part, re.MULTILINE):
            recipe, place, own = parse(kind, "", flags.split(), **defaults)
            name = recipe.name + kind(recipe, 10, **own).run_suffix()
            checkpoint = str(TrainingPaths.of(recipe, place, name).checkpoint(150))
            if recipe.num_heads == 5:
                certified.remove(checkpoint)
            else:
                assert f"pretrained=../0Gaussian/{checkpoint}\n" in section
            commands += 1
    assert commands == 16 and not certified


@pytest.mark.parametrize("queue", sorted((CODES / "queues").glob("*.toml")), ids=lambda path: path.stem)
def test_a_queue_heads_with_its_result(queue, tmp_path):
    """The mean ACR of each label's committed logs, of all heads; a queue without logs says none."""
    logs, head = ROOT / "logs_certification" / queue.stem, queue.read_text().split("[defaults]")[0].replace("\n# ", " ")
    told = dict(re.findall(r"([\w.+-]+) (\.\d{3})", head.split("mean ACR:")[1])) if "mean ACR:" in head else {}
    found = {}
    for log in logs.rglob("*-certify-skip-*.log") if logs.exists() else ():
        if not log.name.endswith("-ACR.log") and "-consensus-" not in log.name:
            found.setdefault(log.relative_to(logs).parts[1], []).append(average_certified_radius(read_log(log)))
    means = {label: sum(acrs) / len(acrs) for label, acrs in found.items()}
    assert means.keys() <= {job.run_name.split("/")[1] for job in read_queue(queue, CODES, tmp_path, "seeds")}
    assert told.keys() == means.keys()
    assert all(float(acr) == pytest.approx(means[label], abs=0.0006) for label, acr in told.items())
