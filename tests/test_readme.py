"""What the READMEs show and no other test runs: links, commands, tables, a defence and a classifier of one's own."""

import re

import pytest
import torch
from conftest import CODES, DEFENCES, ROOT, TINY
from torchvision.models import resnet18

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
    "one head of SmoothAdv": "smoothadv",
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
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(("| Gaussian", "| SmoothAdv"))
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
