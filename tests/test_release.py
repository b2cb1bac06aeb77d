"""The models that come with the code: what their card says of them, and how release.py makes such a file."""

import re

import pytest
import torch
from conftest import CODES, ROOT, TINY

from spacte.files import sha256
from spacte.logs.certlog import average_certified_radius
from spacte.model.checkpoint import load_classifier
from spacte.report.reading import ReadOptions, read_runs
from spacte.smooth.certificates import CERTIFICATES

ROW = r"^\| `(\S+\.pth)` \| \w+, (\d+) \| (\w+), 0\.5 \| .* \| (0\.\d+), (0\.\d+) \| `(\w{64})` \|$"
CARD = (CODES / "pretrained" / "README.md").read_text()
PRETRAINED = sorted(re.findall(ROW, CARD, re.MULTILINE))  # name, heads, data, ACR under each certificate, hash
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
    readme = (ROOT / "README.md").read_text()
    if name.startswith("digits"):
        command = f"--model_path codes/pretrained/{name} --N 1000 --device cpu"
        code, out, err = script("certify_mhead.py", *command.replace("codes/", f"{CODES}/").split())
        assert code == 0, err
        table = [_numbers(line.split("|")[7:-2]) for line in out.splitlines() if line.startswith("| Gaussian")]
        assert f"| {heads}       |" in out and len(table) == 2
        in_readme = f"python codes/certify_mhead.py {command}\n" in readme
        assert in_readme == (heads == "5")
        if in_readme:
            shown = [line.split("|")[2:-1] for line in readme.splitlines() if re.match(r"\| (cohen|all-votes) ", line)]
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
