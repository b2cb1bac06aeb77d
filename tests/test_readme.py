"""What the READMEs show and no other test runs: links, commands, tables, a defence and a classifier of one's own."""

import importlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import CODES, DEFENCES, EXCERPTS, ROOT, TINY
from scipy import stats
from torchvision.models import resnet18

from spacte.files import sha256
from spacte.logs.certlog import average_certified_radius
from spacte.model.checkpoint import load_classifier
from spacte.report.reading import ReadOptions, read_runs
from spacte.smooth.certificates import CERTIFICATES, Certificate, multiclass_certificate

PAGES = [path for folder in (CODES, ROOT / "logs_certification") for path in sorted(folder.rglob("*.md"))
         if not any(parent.is_symlink() for parent in path.parents)]  # fmt: skip
PAGES += [ROOT / "README.md", ROOT / "EXPERIMENTS.md"]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
README = TEXTS["README.md"]


def block_with(text):
    blocks = [code for page in TEXTS.values() for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    (block,) = [code for code in blocks if text in code]
    return block


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1500
    assert len(TEXTS["EXPERIMENTS.md"].splitlines()) <= 200
    for picture in re.findall(r"^!\[.*\]\((.*)\)$", README, re.MULTILINE):
        assert (ROOT / picture).stat().st_size < 200_000, picture


@pytest.mark.parametrize("page", TEXTS)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", TEXTS[page]):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_every_room_that_a_reader_enters_has_a_page():
    rooms = ["codes", "codes/queues", "codes/pretrained", "codes/bench", "codes/spacte/smooth", "logs_certification"]
    rooms += [str(path.relative_to(ROOT)) for path in (ROOT / "logs_certification").iterdir() if path.is_dir()]
    assert {f"{room}/README.md" for room in rooms} <= TEXTS.keys()


def commands():
    """Every command of the pages that calls a script of ours: the page, the script's path in codes/, its flags."""
    for page, text in TEXTS.items():
        for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.match(
                    r"(?:torchrun \S+ -- |(?:CUDA_VISIBLE_DEVICES=0 )?python )(\S+\.py)(.*)",
                    line.split("  #")[0].strip(),
                )
                if found:
                    name = found[1].removeprefix("codes/").removeprefix("../")
                    name = f"0Gaussian/{name}" if name == "train.py" else name
                    yield page, name, re.findall(r"(?<=\s)--[a-z]\w*", found[2])


def test_every_command_calls_a_script_with_flags_that_it_has(script):
    """train.py with the flags of any defence."""
    known = {}
    for page, name, flags in commands():
        if name not in known:
            names = [f"{defence}/train.py" for defence in DEFENCES] if name.endswith("train.py") else [name]
            known[name] = " ".join(script(one, "--help")[1] for one in names)
        for flag in flags:
            assert re.search(rf"{flag}\b", known[name]), f"{page}: {name} has no {flag}"
    assert len(known) >= 12


def test_torchrun_is_kept_from_reading_the_scripts_flags():
    """Without the two hyphens, `--max` would be torchrun's own --max-restarts, cut short."""
    texts = [*TEXTS.values(), (CODES / "certify_mhead.py").read_text()]
    lines = [line for text in texts for line in re.findall(r"^torchrun .*$", text, re.MULTILINE)]
    assert len(lines) >= 2 and all(" -- " in line for line in lines)


def test_three_lines_of_python(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    exec(block_with("print(label, Smooth("), {})
    label, radius = re.fullmatch(r"3 \((\d), (\S+)\)\n", capsys.readouterr().out).groups()
    assert label == "3" and float(radius) == pytest.approx(0.596, abs=0.06), "other draws: 6 standard errors"


@pytest.mark.parametrize("page", [page for page in TEXTS if page.startswith("logs_certification/")])
def test_a_queues_table_is_what_report_prints(script, page):
    command = r"^python codes/report.py (logs_certification/\S+ --over_seeds)$"
    tables = re.findall(command, TEXTS[page], re.MULTILINE)
    assert len(tables) == (page != "logs_certification/README.md")
    for flags in tables:
        folder, *others = flags.split()
        code, out, err = script("report.py", ROOT / folder, *others)
        assert code == 0 and out.strip() in TEXTS[page], err


MEASURED = {
    "one head": "1-head",
    "one self-paced head": "1-head-self",
    "five heads in the paper's ring": "5-heads",
    "five self-paced heads, `--whole_gradient`": "5-heads-self-whole",
    "five self-paced heads, `--whole_gradient --teachers`": "5-heads-self-sound-teachers",
    "one self-paced head, R14": "1-head-R14-self",
    "one self-paced head, R14, `--teachers`": "1-head-R14-self-sound-teachers",
    "five networks": "5-networks/seeds-666-1-2-3-4",
}


def test_the_front_pages_figures_are_those_of_the_queue():
    lines = TEXTS["logs_certification/cifar10-heads/README.md"].splitlines()
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| Gaussian")
    ]
    found = {row[-1].split(", ")[0]: [row[9], row[10][:5], row[14]] for row in rows}  # clean, ACR, at radius 1
    shown = re.findall(r"^\| ([^|]+) \| [\d.]+ \| (0.\d+) \| (0.\d+) \| (0.\d+) \|$", README, re.MULTILINE)
    assert {name: figures for name, *figures in shown} == {name: found[run] for name, run in MEASURED.items()}


def test_a_defence_of_ones_own(script, tmp_path):
    folder = tmp_path / "8Mine"
    folder.mkdir()
    (folder / "train.py").write_text(block_with("class Mine("))
    (folder / "spacte").symlink_to(CODES / "spacte")
    code, _, err = script(folder / "train.py", *TINY, "--num_heads", 2, "--epochs", 1, "--strength", 0.5)
    assert code == 0, err
    (path,) = (tmp_path / "save").rglob("epoch1.pth")
    assert torch.load(path, weights_only=True)["defence"] == "Mine"
    (log,) = (tmp_path / "logs").rglob("*-train.log")
    assert "penalty" in log.read_text().splitlines()[0].split("\t")


def test_a_defence_that_weighs_the_training_images(script, tmp_path):
    folder = tmp_path / "8Weighed"
    folder.mkdir()
    mine, start = block_with("class Mine(").rsplit('if __name__ == "__main__":', 1)
    weighed = "\n".join([mine, block_with("class MineWeighed"), 'if __name__ == "__main__":'])
    (folder / "train.py").write_text(weighed + start.replace("main(Mine", "main(MineWeighed"))
    (folder / "spacte").symlink_to(CODES / "spacte")
    code, _, err = script(folder / "train.py", *TINY, "--train_images", 100, "--num_heads", 2, "--epochs", 2)
    assert code == 0, err


def test_a_classifier_of_ones_own():
    names = {"classifier": lambda images: torch.eye(10)[[3] * len(images)], "image": torch.zeros(3, 8, 8)}
    exec(block_with("label, radius = Smooth("), names)
    assert names["label"] == 3 and 0.9 < names["radius"] < 1


def test_a_function_that_builds_a_classifier(tmp_path):
    torch.save(resnet18(num_classes=10).state_dict(), tmp_path / "mine.pth")
    names = {}
    exec(block_with("# my_models.py"), names)
    assert names["build"](tmp_path / "mine.pth").eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_data_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"classifier": lambda images: torch.eye(10)[[3] * len(images)]}
    names |= {"images": torch.zeros(2, 1, 4, 4), "labels": torch.tensor([3, 3])}
    with pytest.warns(UserWarning, match="no parameters are seen"):
        exec(block_with("log = certify_dataset("), names)
    acr, accuracies = capsys.readouterr().out.split(maxsplit=1)
    assert 0.79 < float(acr) < 0.81 and accuracies == "[1. 1. 1.]\n"  # 0.25 Phi^-1(0.001^(1/10000))
    assert names["log"].name == "mine-certify-skip-20.log"


def test_the_benchmark(script, tmp_path):
    """Every field is there, and the ratio is that of the two speeds; one turn has no other median."""
    flags = ("--arch", "R8", "--dataset", "digits", "--turns", 1, "--seconds", 0.05, "--batch_size", 32)
    code, out, err = script(
        "bench/bench.py",
        *flags,
        "--device",
        "cpu",
        "--json",
        tmp_path / "figures" / "bench.json",
        "--markdown",
        tmp_path / "records" / "today.md",
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "figures" / "bench.json").read_text())
    assert [row["task"] for row in rows] == ["certify", "train"]
    for row in rows:
        assert {"arch", "dataset", "heads", "device", "precision", "batch_size", "ceiling_fraction"} < row.keys()
        assert row["plain"] > 0 and row["ratio"] == row["fast"] / row["plain"] and row["ceiling_fraction"] > 0
    assert f"| {rows[0]['arch']}" in out
    record = (tmp_path / "records" / "today.md").read_text()
    assert (
        record.startswith("## 20") and "python codes/bench/bench.py --arch R8" in record and "| certify | R8" in record
    )
    code, _, err = script("bench/bench.py", *flags, "--task", "certify", "table")
    assert code == 2 and "--task table has flags of its own: give it alone" in err
    code, _, err = script("bench/bench.py", "--dataset", "CIFAR100")
    assert code == 2 and "--dataset needs --arch" in err
    code, _, err = script("bench/bench.py", *flags, "--json", "/dev/null/bench.json")
    assert code == 2 and "cannot write to '/dev/null'" in err


def test_the_tools_for_certificates_from_all_votes(certify, script):
    """Each rule has its row; with all the votes fewer draws reach Cohen's accuracy."""
    log = certify("a", "--N", 1000, "--batch_size", 1000)
    code, out, err = script("studies/certificate_savings.py", log)
    assert code == 0 and out.count("| all-votes") == 2 and out.count("| cohen") == 2, err
    code, _, err = script("studies/certificate_savings.py", log, "--N", 5)
    assert code == 2 and "--N 5 at --alpha 0.001 can never certify" in err and err.count("\n") == 1
    code, _, err = script("studies/certificate_savings.py", certify("b", "--skip_wrong"))
    assert code == 2 and "has images without estimation votes" in err
    code, _, err = script("studies/certificate_savings.py", EXCERPTS)
    assert code == 2 and "has no vote counts beside it" in err


def test_the_rules_for_certificates_that_are_compared(monkeypatch):
    """On a few votes: ours is the library's certificate, Cohen's too, and the joint test's p-value is exact."""
    monkeypatch.syspath_prepend(str(CODES))
    compare = importlib.import_module("compare_certificates")
    selection = np.array([90, 6, 4])
    for estimation in (np.array([900, 60, 40]), np.array([500, 300, 200]), np.array([0, 600, 400])):
        ours = multiclass_certificate(selection, estimation, 0.001, 1.0)[1]
        assert compare.RULES["half"](selection, estimation, 0.001) == pytest.approx(ours, abs=1e-9)
        cohens = Certificate(0.001, 1.0)(selection, estimation)[1]
        assert compare.RULES["Cohen's"](selection, estimation, 0.001) == pytest.approx(cohens, abs=1e-9)
        for rule in compare.RULES.values():
            assert 0 <= rule(selection, estimation, 0.001) < stats.norm.ppf(0.999)


ROW = r"^\| `(\S+\.pth)` \| \w+, (\d+) \| (\w+), 0\.5 \| .* \| (0\.\d+), (0\.\d+) \| `(\w{64})` \|$"
PRETRAINED = sorted(
    re.findall(ROW, TEXTS["codes/pretrained/README.md"], re.MULTILINE)
)  # name, heads, data, ACR under each certificate, hash
LOGGED_AS = {
    "1-head": "cifar10/0Gaussian/1-head/seed-666",
    "1-head-R14-teachers": "cifar10-heads/0Gaussian/1-head-R14-self-sound-teachers/seed-1",
    "5-heads": "cifar10/0Gaussian/5-heads/seed-666",
}


def test_the_pretrained_models_are_those_of_the_table():
    """Hash, size, heads and data of each; their logits are finite."""
    files = sorted((CODES / "pretrained").glob("*.pth"))
    assert [row[0] for row in PRETRAINED] == [file.name for file in files] != []
    for (name, heads, data, *_, digest), file in zip(PRETRAINED, files, strict=True):
        assert sha256(file) == digest and file.stat().st_size < 5e6, name
        loaded = load_classifier(file)
        assert loaded.spec.name == data and loaded.num_heads == int(heads)
        with torch.inference_mode():
            logits = loaded.classifier(torch.rand(2, *loaded.spec.shape))
        assert logits.shape == (int(heads), 2, 10) and logits.isfinite().all()


@pytest.mark.parametrize(("name", "heads", "acrs"), [(row[0], row[1], row[3:5]) for row in PRETRAINED])
def test_the_pretrained_models_have_the_figures_of_the_tables(script, name, heads, acrs):
    """Those of digits are certified, one by README's command, whose table must be what that prints; those of CIFAR-10
    have the logs of the runs that made them. Another machine rounds otherwise.
    """
    if name.startswith("digits"):
        command = f"--model_path codes/pretrained/{name} --N 1000 --device cpu"
        code, out, err = script("certify_mhead.py", *command.replace("codes/", f"{CODES}/").split())
        assert code == 0, err
        table = [_numbers(line.split("|")[7:-2]) for line in out.splitlines() if line.startswith("| Gaussian")]
        assert f"| {heads}       |" in out and len(table) == 2
        in_readme = f"python codes/certify_mhead.py {command}\n" in README
        assert in_readme == (heads == "5")
        if in_readme:
            shown = [line.split("|")[2:-1] for line in README.splitlines() if re.match(r"\| (cohen|all-votes) ", line)]
            assert [len(row) for row in shown] == [len(row) for row in table] == [8, 8]
            for row, told in zip(table, map(_numbers, shown), strict=True):
                assert row == pytest.approx(told, abs=0.004)
        found = [row[3] for row in table]
    else:
        run = ROOT / "logs_certification" / LOGGED_AS[name.removeprefix("cifar10-gaussian-0.50-").removesuffix(".pth")]
        logged = [read_runs([run], ReadOptions(certificate=kind)) for kind in CERTIFICATES]
        found = [average_certified_radius(one.log) for (one,) in logged]
    assert found == pytest.approx([float(acr) for acr in acrs], abs=0.002)


def _numbers(cells):
    return [float(cell.split("±")[0]) for cell in cells]


def test_a_released_checkpoint_is_certified_like_its_own_and_not_resumed(script, trained, tmp_path):
    released, again, half = (tmp_path / f"{name}.pth" for name in ("released", "again", "half"))
    assert script("release.py", trained, "--output", released)[0] == 0
    code, out, _ = script("release.py", trained, "--output", half, "--half")
    assert code == 0 and out.endswith(f"SHA-256 {sha256(half)}\n")
    assert script("release.py", trained, "--output", again)[0] == 0 and sha256(again) == sha256(released)
    sizes = [path.stat().st_size for path in (trained, released, half)]
    assert sizes[0] > 1.8 * sizes[1] > 1.8 * 1.8 * sizes[2]
    images = torch.rand(50, 1, 8, 8)
    with torch.inference_mode():
        whole, same, rounded = (load_classifier(path).classifier(images) for path in (trained, released, half))
    assert torch.equal(whole, same) and 0 < (whole - rounded).abs().max() < 0.02 * whole.abs().max()
    for path, message in ((trained, "'released.pth' exists"), (released, "has been released already")):
        code, _, err = script("release.py", path, "--output", "released.pth" if path == trained else "new.pth")
        assert code == 2 and message in err and err.count("\n") == 1
    released.rename(trained)
    code, _, err = script("0Gaussian/train.py", *TINY, "--num_heads", 2, "--epochs", 1, "--resume")
    assert code == 2 and "it cannot be resumed" in err
