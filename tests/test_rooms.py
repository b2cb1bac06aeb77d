"""The house: which room imports which, what reading a log needs, what a defence's folder shows."""

import ast
import subprocess
import sys

import pytest
from conftest import CODES, DEFENCES

LIBRARY = CODES / "spacte"
# What a module of a room may import from the library; every room may import the modules beside the rooms.
ROOMS = {
    "data": {"data"},
    "model": {"data", "model"},
    "train": {"data", "model", "train"},
    "smooth": {"model", "smooth"},
    "logs": {"smooth", "logs"},
    "report": {"data", "smooth", "logs", "report"},
    "certify": {"data", "model", "smooth", "logs", "report", "certify"},
}
BESIDE = {"cli", "device", "distributed", "utils"}


def imported(path):
    """The first parts of all `spacte.<part>` that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spacte":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("spacte.")]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_before_it(room):
    for path in sorted((LIBRARY / room).rglob("*.py")):
        strange = set(imported(path)) - ROOMS[room] - BESIDE
        assert not strange, f"{path.name} imports {strange}"


def test_what_lies_beside_the_rooms_imports_none_of_them():
    for name in BESIDE:
        assert set(imported(LIBRARY / f"{name}.py")) <= BESIDE


def test_every_folder_is_a_room():
    assert {path.parent.name for path in LIBRARY.glob("*/__init__.py")} == set(ROOMS)


def run(code, folder=CODES):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_reading_logs_imports_no_torch():
    modules = ["certlog", "votes", "runfiles", "from_votes"]
    lines = [f"import spacte.logs.{name}" for name in modules]
    lines += [f"import spacte.report.{path.stem}" for path in (LIBRARY / "report").glob("*.py")]
    result = run("\n".join([*lines, "import sys", "assert 'torch' not in sys.modules"]))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_defences_folder_shows_the_files_that_the_papers_readme_lists(defence):
    """As a user in that folder imports them."""
    result = run(
        "from core_mhead import Smooth; from model import build_classifier; import circular_teaching, utils, train\n"
        "print(build_classifier('R8', 'digits', 2)[1].cosine_loss().shape, Smooth.ABSTAIN, utils.sha256.__name__)",
        CODES / defence,
    )
    assert result.stdout == "torch.Size([]) -1 sha256\n", result.stderr


def test_the_earlier_short_names_still_import():
    result = run(
        "from spacte.teaching import pace_threshold, teaching_weights, head_weights\n"
        "from spacte.model import build_classifier\n"
        "from spacte.core_mhead import Smooth\n"
        "from spacte.bounds import lower_confidence_bound, anytime_lower_bound\n"
        "from spacte.certlog import read_log, average_certified_radius, certified_accuracy\n"
        "import spacte; [getattr(spacte, name) for name in spacte.__all__]"
    )
    assert result.returncode == 0, result.stderr
