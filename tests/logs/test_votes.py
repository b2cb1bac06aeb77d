"""Vote counts as they lie on disk: what cannot have been counted is refused, what older runs wrote is read."""

import gzip
import json

import numpy as np
import pytest

from spacte.logs.config import RunConfig
from spacte.logs.counts import VoteCounts, disagreement, read_counts
from spacte.logs.runfiles import RunFiles
from spacte.utils import UserError

GOOD = VoteCounts(7, 2, 1.5, np.array([[0, 5, 1], [6, 0, 0]]), np.array([[90, 0, 10], [0, 0, 100]]))


def changed(**fields):
    """The line of GOOD with other fields."""
    return json.dumps(json.loads(GOOD.to_line()) | fields)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not a vote count"),
    ("[]", "must hold an object"),
    ('{"idx": 1, "idx": 2}', "twice"),
    (changed(idx=-1), "idx must be an integer of at least 0, not -1"),
    (changed(idx=True), "idx must be"),
    (changed(label=3), "label 3 of 3 classes"),
    (changed(classes="3"), "classes must be"),
    (changed(seconds=-1), "seconds must be"),
    (changed(selection=[]), "a list with"),
    (changed(selection=[{"0": 6}]), "1 voters select and 2 estimate"),
    (changed(estimation=[{"0": 90}, {"2": 100}]), "draws differ"),
    (changed(estimation=[{"3": 100}, {"2": 100}]), "class '3' with 100 votes"),
    (changed(estimation=[{"0": -100}, {"2": 100}]), "class '0' with -100 votes"),
    (changed(estimation=[{"0": 1.5}, {"2": 100}]), "class '0' with 1.5 votes"),
    (changed(disagreed=107), "the first disagreed on 107 of 106 draws"),
    (changed(disagreed=True), "the first disagreed on True of 106 draws"),
])  # fmt: skip
def test_a_line_that_nobody_counted_is_refused(tmp_path, line, message):
    path = tmp_path / "x-counts.jsonl"
    path.write_text(GOOD.to_line() + line + "\n")
    with pytest.raises(UserError, match=r"x-counts.jsonl', line 2: ") as error:
        read_counts(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_consensus_disagreed_on_is_of_the_images_that_say_it():
    assert "disagreed" not in GOOD.to_line() and VoteCounts.from_line(GOOD.to_line()).disagreed is None
    some = [VoteCounts.from_line(changed(disagreed=number)) for number in (0, 53)]
    assert VoteCounts.from_line(some[1].to_line()).disagreed == 53
    assert disagreement([some[0], GOOD, some[1]]) == {"disagreed": 53, "seen": 212, "share": 0.25}
    assert disagreement([GOOD]) is None


def test_an_image_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "x-counts.jsonl"
    path.write_text(GOOD.to_line() * 2)
    with pytest.raises(UserError, match="line 2: idx 7 occurs twice"):
        read_counts(path)


def test_compressed_counts_are_read_where_only_they_are_there(tmp_path):
    files = RunFiles(tmp_path / "x.log")
    (tmp_path / "x-counts.jsonl.gz").write_bytes(gzip.compress(GOOD.to_line().encode()))
    (again,) = read_counts(files.counts)
    assert (again.estimation == GOOD.estimation).all() and again.idx == 7
    (tmp_path / "x-counts.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot read vote counts"):
        read_counts(files.counts)


def test_what_decides_no_vote_does_not_divide_runs():
    """Upgrades of pandas and Python's patch release do not; one of torch does."""
    earlier = {"alpha": 0.1, "versions": {"python": "3.11.7", "torch": "2.14.1", "pandas": "3.1.1", "numpy": "2.4.6"}}
    new = {"alpha": 0.1, "versions": {"python": "3.11", "torch": "2.14.1", "numpy": "2.4.6"}}
    other = new | {"versions": new["versions"] | {"torch": "2.15.0"}}
    earlier, new, other = map(RunConfig.from_json, (earlier, new, other))
    assert earlier.differences(new) == ""
    assert "versions" in earlier.differences(other)
