"""The library installed: wheel and source archive build; a fresh environment's commands run from the wheel alone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from children import run
from conftest import EXCERPTS, ROOT

BUILD = "import sys; from setuptools import build_meta as b; f = sys.argv[1]; b.build_wheel(f); b.build_sdist(f)"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the source archive, built from a copy, so that nothing is left in the checkout."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    listed = ["pyproject.toml", "README.md"]
    listed += [
        str(path.relative_to(ROOT))
        for path in (ROOT / "codes/spacte").rglob("*")
        if path.suffix in (".py", ".html", ".typed")
    ]
    for name in listed:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    done = run([sys.executable, "-c", BUILD, built], cwd=source)
    assert done.returncode == 0, done.stderr
    return next(built.glob("*.whl")), next(built.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """A fresh environment's folder of commands: the wheel in it, what it depends on beside it."""
    folder = tmp_path_factory.mktemp("environment")
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", folder],
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            folder / "bin/python",
            "install",
            "--no-deps",
            "--no-index",
            archives[0],
        ],
    ):
        subprocess.run([*map(str, command)], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def test_the_archives_hold_the_library_and_nothing_else(archives):
    library = {str(path.relative_to(ROOT / "codes")) for path in (ROOT / "codes/spacte").rglob("*.py")}
    wheel = {name for name in zipfile.ZipFile(archives[0]).namelist() if ".dist-info/" not in name}
    assert wheel == library | {"spacte/report/page.html", "spacte/py.typed"}
    with tarfile.open(archives[1]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"codes/{name}" for name in wheel} | {"pyproject.toml", "README.md"} <= names


def test_the_commands_run_from_the_wheel(installed, tmp_path):
    """From a folder that knows nothing of the checkout: a report page, a certification of a function."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def command(name, *flags):
        done = run([installed / name, *flags], cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = command("python", "-c", "import spacte; print(spacte.__file__)")
    assert where.startswith(str(installed.parent))
    assert "R110" in command("spacte-report", EXCERPTS, "--html", "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    flags = ("--classifier", "mine.py:build", "--dataset", "digits", "--noise_sd", 0.5, "--skip", 90, "--N", 200)
    assert "build-certify-skip-90.log" in command("spacte-certify", *flags, "--device", "cpu")


@pytest.mark.parametrize("name", ["certify", "predict", "attack", "report", "relog", "merge"])
def test_every_command_says_what_it_does(name, monkeypatch, capsys):
    from spacte import commands

    monkeypatch.setattr(sys, "argv", [f"spacte-{name}", "--help"])
    with pytest.raises(SystemExit) as end:
        getattr(commands, name)()
    assert end.value.code in (0, None)
    assert f"usage: spacte-{name} " in capsys.readouterr().out
    assert f'spacte-{name} = "spacte.commands:{name}"' in (ROOT / "pyproject.toml").read_text()
