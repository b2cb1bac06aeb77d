"""Files damaged at random, always in the same ways, and senseless flags: read as what they still are, or refused in
one line.
"""

import copy
import gzip
import json
import random
import re
import socket
import struct
import warnings

import numpy as np
import pytest
import torch
from conftest import CODES, EXCERPTS, ROOT, RUN_FLAGS, TINY, make_log

from spacte.data.sources import open_split
from spacte.jobs.queue_file import read_queue
from spacte.logs.counts import read_counts
from spacte.logs.runfiles import RunFiles
from spacte.model.checkpoint import load_classifier
from spacte.report.reading import read_runs
from spacte.report.table import summary
from spacte.utils import UserError

COUNTS = next((ROOT / "logs_certification/cifar10-depth").rglob("*-counts.jsonl.gz"))
LINES = b"".join(gzip.decompress(COUNTS.read_bytes()).splitlines(keepends=True)[:5])
STRANGE = [None, True, -1, -0.5, 10**30, 1e400, "x", [], {}, [[1]], "9" * 5000, "../x"]


@pytest.fixture
def random_state():
    return random.Random(0)


def damaged(content: bytes, random_state) -> bytes:
    """With bytes changed, taken out, put in, or cut off."""
    content = bytearray(content)
    for _ in range(random_state.choice([1, 1, 2, 5])):
        place, how = random_state.randrange(len(content) + 1), random_state.randrange(4)
        if how == 0 and place < len(content):
            content[place] = random_state.randrange(256)
        elif how == 1:
            del content[place : place + random_state.randrange(1, 40)]
        elif how == 2:
            content[place:place] = random_state.randbytes(random_state.randrange(1, 9))
        else:
            del content[place:]
    return bytes(content)


def refused(read) -> int:
    """Whether the reader refuses, in one line; any other error fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            return 1
    return 0


def test_vote_counts(tmp_path, random_state):
    plain, packed = tmp_path / "x-counts.jsonl", tmp_path / "x-counts.jsonl.gz"
    number = 0
    for _ in range(150):
        plain.write_bytes(damaged(LINES, random_state))
        packed.write_bytes(damaged(gzip.compress(LINES), random_state))
        number += refused(lambda: read_counts(plain)) + refused(lambda: read_counts(packed))
    for name in json.loads(LINES.splitlines()[0]):
        for value in STRANGE:
            plain.write_text(json.dumps(json.loads(LINES.splitlines()[0]) | {name: value}) + "\n")
            number += refused(lambda: read_counts(plain))
    for line in ('{"idx": ' + "9" * 5000 + "}", "[" * 100_000):
        plain.write_text(line + "\n")
        assert refused(lambda: read_counts(plain))
    assert number > 200


def test_configurations(tmp_path, random_state):
    whole, number = COUNTS.with_name(COUNTS.name.replace("-counts.jsonl.gz", ".json")).read_bytes(), 0
    for _ in range(150):
        (tmp_path / "x.json").write_bytes(damaged(whole, random_state))
        number += refused(RunFiles(tmp_path / "x.log").read_json)
    assert number > 50


def test_logs(tmp_path, random_state):
    whole, number = next(EXCERPTS.rglob("*.log")).read_bytes(), 0
    for _ in range(100):
        (tmp_path / "x.log").write_bytes(damaged(whole, random_state))
        number += refused(lambda: summary(read_runs([tmp_path / "x.log"]), [0.5]))
    assert number > 50


def test_a_file_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    """A folder may hold what no program reads: a socket, a file of /proc."""
    make_log(tmp_path / "a.log", [(0, 1, 1, 0.5)])
    (tmp_path / "b.log").symlink_to("/proc/self/mem")
    with pytest.warns(UserWarning, match=r"b.log' cannot be read \(Input/output error\): left out"):
        assert [run.path.name for run in read_runs([tmp_path])] == ["a.log"]


def test_queue_files(tmp_path, random_state):
    path, whole, number = tmp_path / "q.toml", (CODES / "queues/digits-defences.toml").read_bytes(), 0
    for content in [b"x = " + b"[" * 500, *(damaged(whole, random_state) for _ in range(100))]:
        path.write_bytes(content)
        number += refused(lambda: read_queue(path, CODES, tmp_path, "seeds"))
    assert number > 30


def test_checkpoints(tmp_path, random_state):
    """Fields of another type: those that are ours."""
    path, number = tmp_path / "x.pth", 0
    whole = torch.load(CODES / "pretrained/digits-gaussian-0.50-5-heads.pth", weights_only=True)
    strange = [*STRANGE, (), b"x", torch.zeros(2), float("nan")]
    for place in [(name,) for name in (*whole, "int8")] + [
        (name, part) for name in ("data", "args") for part in whole[name]
    ]:
        for value in random_state.sample(strange, 2):
            contents = copy.deepcopy(whole)
            (contents if len(place) == 1 else contents[place[0]])[place[-1]] = value
            torch.save(contents, path)
            number += refused(lambda: load_classifier(path))
    assert number > 25


def test_files_of_mnist(tmp_path, random_state, monkeypatch):
    def no_network(*_):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    raw, number = tmp_path / "MNIST/raw", 0
    raw.mkdir(parents=True)
    images, labels = np.zeros((20, 28, 28), dtype=np.uint8), np.zeros(20, dtype=np.uint8)

    def content(array):
        return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()

    whole = {"images-idx3-ubyte": content(images), "labels-idx1-ubyte": content(labels)}
    other = [("labels-idx1-ubyte", content(array)) for array in (labels[:0], labels[:9], labels + 200, images)]
    other += [("images-idx3-ubyte", content(array)) for array in (images[:0], images[:9], labels)]
    other += [(name, damaged(whole[name][:20], random_state) + whole[name][20:]) for name in whole for _ in range(25)]
    for name, damage in other:
        for part in ("train", "t10k"):
            for file, good in whole.items():
                (raw / f"{part}-{file}").write_bytes(good)
        (raw / f"train-{name}").write_bytes(damage)
        number += refused(lambda: open_split("MNIST", tmp_path, True))
    assert number > 40


SENSELESS = [
    "", "-1", "0", "nan", "inf", "1e400", "1e-320", "9" * 5000, str(2**63), "../x", "1_000", "0x10", "x" * 300, "--",
    "1/0", "/dev/null", ".", "a b", "$x_y^", "true",
]  # fmt: skip


def refused_flags(script, name, flags, count, random_state) -> int:
    """How many calls of a script, each of its flags with `count` values, are refused: all in one line."""
    number = 0
    _, text, _ = script(name, "--help")
    for flag in sorted(set(re.findall(r"(?<![\w-])--\w+", text.partition("options:")[2])) - {"--help"}):
        for value in random_state.sample(SENSELESS, count):
            code, _, err = script(name, *flags, flag, value)
            if code:
                said = [line for line in err.splitlines() if "warning: " not in line]
                assert code == 2 and len(said) == 1 and " error: " in said[0], (flag, value, err)
                number += 1
    return number


def test_flags_of_what_reads(script, certify, digits_models, random_state):
    log = certify("logs", "--skip", 90)
    scripts = {
        "report.py": [log],
        "relog.py": [log, "--overwrite"],
        "merge_logs.py": [log],
        "release.py": [digits_models[1], "--output", "r.pth"],
        "studies/power.py": ["--width", "0.1", log],
        "experiments.py": [CODES / "queues/digits.toml", "--work", "w", "--list"],
    }
    assert sum(refused_flags(script, *one, 4, random_state) for one in scripts.items()) > 60


def test_flags_of_what_computes(script, digits_models, random_state):
    scripts = {
        "certify_mhead.py": ["--model_path", digits_models[1], "--skip", 180, *RUN_FLAGS, "--overwrite"],
        "0Gaussian/train.py": [*TINY, "--num_heads", 1, "--epochs", 1, "--train_images", 10],
    }
    assert sum(refused_flags(script, *one, 1, random_state) for one in scripts.items()) > 30
