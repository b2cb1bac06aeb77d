"""The configuration of a run: what it says of the heads, and what older, newer and damaged files become."""

import json
from dataclasses import fields, replace

import pytest
from conftest import ROOT

from spacte.logs.config import CERTIFIES, DESCRIBES, IDENTIFIES, RANKED, RunConfig
from spacte.logs.voting import Heads, Stopping
from spacte.utils import UserError

COMMITTED = sorted((ROOT / "logs_certification").rglob("certify-mhead/*.json"))
VERSIONS = {"python": "3.11", "torch": "2.14.1"}
WHOLE = RunConfig(
    dataset="CIFAR10", arch="R8", num_heads=(5,), noise_sd=0.5, defence="Gaussian", checkpoint_sha256=("a",),
    data_sha256="b", precision="fp32", versions=VERSIONS, N0=100, N=1000, alpha=0.001,
)  # fmt: skip


def test_the_committed_configurations_are_whole_and_stay_as_they_are():
    assert len(COMMITTED) > 50
    for path in COMMITTED:
        content = json.loads(path.read_text())["config"]
        config = RunConfig.from_json(content)
        assert not config.lacks(DESCRIBES, CERTIFIES, RANKED) and not config.unknown, path
        written = config.to_json()
        assert [name for name in written if name in content] == list(content), "in the same order"
        assert written.items() >= content.items() and written.keys() - content.keys() <= {"certificate"}
        assert RunConfig.from_json(written) == config


@pytest.mark.parametrize(
    "config",
    [
        WHOLE,
        replace(WHOLE, sequential=Stopping((0.0, 0.25), 0.01), skip_wrong=True, head=2, consensus=None),
        replace(WHOLE, sequential=Stopping((0.5,))),
        replace(WHOLE, sequential=Stopping(tolerance=0.1), consensus=3, normalize=("mean_std",)),
        replace(WHOLE, kind="predict", N0=0),
        replace(WHOLE, seed=2**63 - 1, noise_sd=2e9, N=10**12),
        replace(WHOLE, kind="attack", N0=0, radii=(0.25, 0.5), num_steps=20, log_sha256="c", climbs_from="label"),
        replace(WHOLE, classifier="x.py:build", classifier_args={"scale": [1, 2]}, checkpoint_sha256=()),
    ],
)
def test_a_configuration_is_the_same_when_it_is_read_again(config):
    again = RunConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and again.differences(config) == "" and not again.lacking


def test_what_identifies_a_smoothed_classifier_and_its_images():
    """An attack is refused on what differs in one of these from what was certified."""
    found = {one.name for one in fields(RunConfig) if IDENTIFIES in one.metadata.get("needed", ())}
    assert found == {
        "noise_sd", "checkpoint_sha256", "normalize", "scales_sha256", "classifier", "classifier_args",
        "classifier_files", "classifier_sha256", "parameters_sha256", "answers", "data_sha256", "head", "exact_noise",
        "precision", "consensus",
    }  # fmt: skip
    assert "data_sha256" in WHOLE.differences(replace(WHOLE, data_sha256="x"), IDENTIFIES)


def test_a_kind_writes_its_own_fields_alone():
    attack = replace(WHOLE, kind="attack").to_json()
    assert "radii" in attack and "sequential" not in attack and "consensus" not in attack
    assert WHOLE.to_json()["sequential"] is None and "radii" not in WHOLE.to_json()
    assert "parameters_sha256" not in WHOLE.to_json() and "normalize" not in WHOLE.to_json()
    assert replace(WHOLE, classifier="x.py:build").to_json()["parameters_sha256"] is None, "none are seen"


def test_older_files_lack_what_then_had_its_default_and_newer_ones_hold_more():
    content = WHOLE.to_json()
    del content["certificate"], content["defence"]
    older = RunConfig.from_json(content)
    assert not older.lacking and older.certificate == "cohen"
    newer = RunConfig.from_json(WHOLE.to_json() | {"temperature": 2})
    assert newer.to_json()["temperature"] == 2 and "temperature (None there, 2 here)" in WHOLE.differences(newer)


WRONG = {"alpha": 2, "num_heads": "5", "noise_sd": -1, "skip_wrong": None, "certificate": "new", "consensus": "two"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named_and_stays_in_the_file(name):
    config = RunConfig.from_json(WHOLE.to_json() | {name: WRONG[name]})
    assert config.lacking == (name,) and name in config.lacks(DESCRIBES, CERTIFIES)
    assert config.to_json()[name] == WRONG[name] and name in config.differences(WHOLE)


@pytest.mark.parametrize("name", ["alpha", "num_heads", "noise_sd", "skip_wrong", "N"])
def test_a_missing_field_is_named(name):
    config = RunConfig.from_json({key: one for key, one in WHOLE.to_json().items() if key != name})
    assert config.lacking == (name,) and name not in config.to_json()


def test_what_belongs_to_another_kind_stays_in_the_file():
    config = RunConfig.from_json(WHOLE.to_json() | {"radii": [1]})
    assert config.radii == () and config.to_json()["radii"] == [1] and not config.lacking


def test_differences_are_named_with_both_values():
    other = replace(WHOLE, alpha=0.01, noise_sd=0.25)
    assert WHOLE.differences(other) == "noise_sd (0.5 there, 0.25 here), alpha (0.001 there, 0.01 here)"
    assert WHOLE.differences(other, IDENTIFIES) == "noise_sd (0.5 there, 0.25 here)"


def test_every_field_says_what_is_legal():
    """A further field is one line."""
    assert all(one.metadata for one in fields(RunConfig) if one.name not in ("lacking", "unknown"))


@pytest.mark.parametrize(
    ("heads", "text", "words"),
    [
        (Heads((1,)), "1", "1 head"),
        (Heads((5,)), "5", "5 heads"),
        (Heads((5, 1)), "5+1", "5+1 heads"),
        (Heads((1, 1, 1)), "3 networks", "3 networks"),
        (Heads((1, 1, 1), head=1), "network 1 of 3", "network 1 of 3"),
        (Heads((5,), head=2), "head 2 of 5", "head 2 of 5"),
        (Heads((5,), consensus=2), "5 by consensus of 2", "5 heads by consensus of 2"),
        (Heads((1, 1, 1), consensus=2), "3 networks by consensus of 2", "3 networks by consensus of 2"),
    ],
)
def test_heads_as_text(heads, text, words):
    assert (str(heads), heads.in_words) == (text, words)
    assert heads.voter == (-1 if heads.head is None else heads.head)


def test_a_head_alone():
    assert Heads((5,), consensus=2).alone(1) == Heads((5,), head=1)
    with pytest.raises(UserError, match="of networks, not of heads"):
        Heads((5, 1, 1), consensus=2).alone(1)
