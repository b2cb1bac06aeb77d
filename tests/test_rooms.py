"""The house: which room imports which, what reading a log needs, what a defence's folder shows."""

import ast
import importlib
import sys
from pathlib import Path

import children
import pytest
import torch
from conftest import CODES, DEFENCES, OWN_MODULES

import spacte

LIBRARY = CODES / "spacte"
# What a module of a room may import from the library; every room may import the modules beside the rooms.
ROOMS = {
    "data": {"data"},
    "model": {"data", "model"},
    "train": {"data", "model", "train"},
    "smooth": {"model", "smooth"},
    "logs": {"data", "smooth", "logs"},
    "report": {"data", "smooth", "logs", "report"},
    "certify": {"data", "model", "smooth", "logs", "certify"},
    "jobs": {"jobs"},
}
BESIDE = {
    "cli", "device", "distributed", "files", "names", "precision", "processes", "provenance", "script", "utils",
}  # fmt: skip


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
    return children.run([sys.executable, "-c", code], cwd=folder)


def test_reading_logs_imports_nothing_that_takes_seconds():
    """Neither torch nor what single predictions and pictures need."""
    lines = ["import spacte.certify.relog"]  # relog.py and merge_logs.py
    lines += [
        f"import spacte.{room}.{path.stem}" for room in ("logs", "report") for path in (LIBRARY / room).glob("*.py")
    ]
    result = run("\n".join([*lines, "import sys", "print({'torch', 'scipy.stats', 'matplotlib'} & {*sys.modules})"]))
    assert result.returncode == 0 and result.stdout == "set()\n", result.stdout + result.stderr


def test_training_and_certification_start_without_what_they_need_late_or_never():
    modules = ("certify.certify", "certify.predict", "certify.attack", "train.command")
    lines = [f"import spacte.{module}" for module in modules]
    result = run("\n".join([*lines, "import sys", "print({'scipy.stats', 'sklearn', 'matplotlib'} & {*sys.modules})"]))
    assert result.returncode == 0 and result.stdout == "set()\n", result.stdout + result.stderr


PAPERS = DEFENCES[:3]  # the paper's README lists these files in each of their folders


@pytest.mark.parametrize("defence", PAPERS)
def test_a_defences_folder_shows_the_files_that_the_papers_readme_lists(defence, monkeypatch):
    """They are imported from there, as a script in that folder would."""
    names = ("core_mhead", "model", "utils", "circular_teaching", "train")
    monkeypatch.syspath_prepend(str(CODES / defence))
    forgotten = {*names, *OWN_MODULES}
    for name in forgotten:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in names}
    for name, module in modules.items():
        assert Path(module.__file__).is_relative_to(CODES / defence), name
    network = modules["model"].build_classifier("R8", "digits", 2)
    label, _ = modules["core_mhead"].Smooth(network, 10, 0.5).certify(torch.rand(1, 8, 8), 5, 20, 0.1, 20)
    assert label in range(-1, 10) and modules["core_mhead"].Smooth.ABSTAIN == -1
    for name in forgotten:
        sys.modules.pop(name, None)


def test_a_folder_links_what_it_needs_and_no_more():
    """The scripts and the library; the further bases' folders have no link that nothing there uses."""
    scripts = {"certify_mhead.py", "predict_mhead.py", "attack_mhead.py", "spacte"}
    for defence in DEFENCES:
        links = {path.name for path in (CODES / defence).iterdir() if path.is_symlink()}
        assert links == scripts | ({"model", "core_mhead.py", "utils.py"} if defence in PAPERS else set())
        assert all((CODES / defence / name).resolve().exists() for name in links)


def test_the_public_names_are_shown_and_there():
    """Others' programs stand on them."""
    names = "Objective Smooth UserError average_certified_radius build_classifier certified_accuracy certify_dataset"
    tree = ast.parse(Path(spacte.__file__).read_text())
    typed = {
        one.asname: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for one in node.names
    }
    del typed[None]
    assert typed == spacte._PUBLIC, "what a type checker sees"
    assert sorted(spacte.__all__) == [*names.split(), "freeze", "load_classifier", "open_split", "read_log"]
    assert set(spacte.__all__) <= set(dir(spacte)) and all(callable(getattr(spacte, name)) for name in spacte.__all__)
