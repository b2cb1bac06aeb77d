"""Runs with --precision int8: what they need, what their logs say, who may resume them."""

import json

import pytest
import torch
from conftest import DIGITS, RUN_FLAGS, attack_flags, beside, without_time

from spacte.certify import loading
from spacte.certify.dataset import certify_dataset
from spacte.logs.certlog import read_log
from spacte.logs.counts import read_counts
from spacte.model import checkpoint
from spacte.precision import select_precision
from spacte.utils import UserError

INT8 = ("--precision", "int8")


def counts_of(log):
    return read_counts(beside(log, "-counts.jsonl"))


def votes(log):
    return [(one.idx, one.selection.tolist(), one.estimation.tolist()) for one in counts_of(log)]


def config(log):
    return json.loads(beside(log, ".json").read_text())["config"]


@pytest.fixture
def no_training_data(monkeypatch):
    """From here on whoever asks for training images gets an error."""

    def open_split(name, data_dir, train, **more):
        if train:
            raise UserError("there are no training images here")
        return opened(name, data_dir, train, **more)

    opened = loading.open_split
    monkeypatch.setattr(loading, "open_split", open_split)


def test_the_log_says_so_and_resumes_with_any_batch_and_pass(script, certify, digits_models):
    whole = certify("whole", *INT8)
    assert config(whole)["precision"] == "int8" and len(config(whole)["scales_sha256"]) == 1
    first = certify("resumed", *INT8, "--max", 150)
    assert len(read_log(first)) < len(read_log(whole))
    resumed = certify("resumed", *INT8, "--batch_size", 77, "--images_per_pass", 13)
    assert votes(resumed) == votes(whole) and without_time(resumed) == without_time(whole)
    command = ("--model_path", digits_models[0], "--logs_dir", "resumed", "--skip", 30, *RUN_FLAGS)
    code, _, err = script("0Gaussian/certify_mhead.py", *command)
    assert code == 2 and "precision (int8 there, fp32 here)" in err and "scales_sha256" in err


def test_a_released_file_carries_its_scales(script, certify, digits_models, tmp_path, no_training_data):
    """Its run is its own: another file. The votes are the checkpoint's, and no training images are asked for."""
    code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", digits_models[0], *RUN_FLAGS, *INT8)
    assert code == 2 and err.count("\n") == 1 and "no training images here" in err and "release.py --int8" in err
    released, half, late = (tmp_path / f"{name}.pth" for name in ("released", "half", "late"))
    assert script("release.py", digits_models[0], "--output", released, "--int8", "data")[0] == 0
    assert script("release.py", digits_models[0], "--output", half, "--int8", "data", "--half")[0] == 0
    log = certify("released", *INT8, "--sequential", "--certificate", "all-votes", models=[released])
    held = checkpoint.load_classifier(released).scales
    assert config(log)["scales_sha256"] == [held.sha256] and held.images == 500 and held.noise_sd == 0.5
    assert checkpoint.load_classifier(half).scales.sha256 != held.sha256
    (again,) = [path for path in (tmp_path / "released").rglob("*.log") if "ACR" not in path.name]
    assert script("relog.py", again, "--alpha", 0.01)[0] == 0
    code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", released, *RUN_FLAGS, *INT8, "--noise_sd", 0.25)
    assert code == 2 and "no training images here" in err  # scales of another noise
    assert script("release.py", digits_models[0], "--output", tmp_path / "plain.pth")[0] == 0
    assert script("release.py", tmp_path / "plain.pth", "--output", late, "--int8", "data")[0] == 0
    assert late.read_bytes() == released.read_bytes()
    other = torch.load(digits_models[0], weights_only=True) | {"data_sha256": "of other images"}
    torch.save(other, tmp_path / "other.pth")
    for path, more, line in (
        (tmp_path / "other.pth", ("--int8", "data"), "was trained on other images than are there"),
        (tmp_path / "plain.pth", (), "--int8 alone would add its scales"),
        (released, ("--int8", "data"), "released already, with scales of int8"),
    ):
        code, _, err = script("release.py", path, "--output", tmp_path / "new.pth", *more)
        assert code == 2 and line in err and err.count("\n") == 1 and not (tmp_path / "new.pth").exists()


def test_a_released_files_votes_are_the_checkpoints(script, certify, digits_models, tmp_path):
    released = tmp_path / "released.pth"
    assert script("release.py", digits_models[0], "--output", released, "--int8", "data")[0] == 0
    logs = [certify(name, *INT8, models=[path]) for name, path in (("one", digits_models[0]), ("two", released))]
    assert votes(logs[0]) == votes(logs[1])
    assert config(logs[0])["scales_sha256"] == config(logs[1])["scales_sha256"]


def test_damaged_scales_and_another_networks_are_refused(script, digits_models, tmp_path):
    contents = torch.load(digits_models[0], weights_only=True)
    scales = checkpoint.load_classifier(digits_models[0]).with_scales(torch.rand(20, 1, 8, 8)).scales.to_file()
    fewer = {name: peak for name, peak in scales["peaks"].items() if name != "conv1"}
    for held, line in (
        ([1], "holds incomplete scales of int8"),
        (scales | {"peaks": {"conv1": -1.0}}, "holds scales of int8 that are not positive or finite"),
        (scales | {"peaks": fewer}, "another network's: there is none for 'conv1'"),
    ):
        torch.save(contents | {"int8": held}, tmp_path / "damaged.pth")
        code, _, err = script("0Gaussian/certify_mhead.py", "--model_path", "damaged.pth", *RUN_FLAGS, *INT8)
        assert code == 2 and line in err and err.count("\n") == 1, err
    assert not (tmp_path / "logs").exists()


def test_heads_consensus_ensembles_and_shards_agree(script, certify, digits_models, tmp_path):
    """The same noise in all: the heads' votes are alike, whoever else votes; shards merge to the whole."""
    whole = certify("whole", *INT8)
    alone, first = certify("alone", *INT8, "--head", 1), certify("first", *INT8, "--consensus", 2)
    assert votes(alone) == votes(whole)
    for one, of_two in zip(counts_of(whole), counts_of(first), strict=True):
        assert one.estimation[:2].tolist() == of_two.estimation[:2].tolist()
    ensemble = certify("ensemble", *INT8, models=digits_models)
    assert len(config(ensemble)["scales_sha256"]) == 2 and config(ensemble)["num_heads"] == [3, 1]
    shards = [certify(f"shard-{k}", *INT8, "--shard", f"{k}/2") for k in (1, 2)]
    moved = [log.rename(whole.parent / log.name) for log in shards]
    for log, new in zip(shards, moved, strict=True):
        for ending in (".json", "-counts.jsonl"):
            beside(log, ending).rename(beside(new, ending))
    whole_votes = votes(whole)
    for ending in (".log", ".json", "-counts.jsonl", "-ACR.log"):
        beside(whole, ending).unlink(missing_ok=True)
    code, _, err = script("merge_logs.py", *moved)
    assert code == 0, err
    assert votes(whole) == whole_votes


def test_an_attack_climbs_the_float_network_and_the_int8_network_votes(script, certify, digits_models, tmp_path):
    log = certify("whole", *INT8, skip=60)
    more = ("--radii", 0.5, "--max", 61)
    code, _, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], log, *more))
    assert code == 2 and "precision" in err  # of another classifier
    code, _, err = script("0Gaussian/attack_mhead.py", *attack_flags(digits_models[0], log, *more, *INT8))
    assert code == 0 and err.count("int8 has no gradient: the float32 network is attacked") == 1
    code, _, err = script(
        "0Gaussian/predict_mhead.py",
        "--model_path",
        digits_models[0],
        "--N",
        100,
        "--skip",
        100,
        "--device",
        "cpu",
        *INT8,
    )
    assert code == 0, err


def test_what_int8_is_not_for_is_one_line(script, digits_models, tmp_path):
    network = tmp_path / "mine.py"
    network.write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    model = ("--model_path", digits_models[0])
    for command, line in (
        ((*model, "--compile"), "--compile has nothing to do for --precision int8"),
        (("--classifier", f"{network}:build", *DIGITS), "codes/examples/int8.py"),
    ):
        code, _, err = script("0Gaussian/certify_mhead.py", *command, *RUN_FLAGS, *INT8)
        assert code == 2 and line in err and err.count("\n") == 1, err
    code, _, err = script("0Gaussian/train.py", "--dataset", "digits", *INT8)
    assert code == 2 and "invalid choice: 'int8'" in err
    code, _, err = script("bench/bench.py", *INT8)
    assert code == 2 and "--precision int8 needs --task certify" in err
    with pytest.raises(UserError, match="int8 runs on a CPU only"):
        select_precision("int8", torch.device("cuda"))
    assert not (tmp_path / "logs").exists()


def test_from_python(digits_models, tmp_path):
    loaded = checkpoint.load_classifier(digits_models[0])
    data = (torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    settings = {"N0": 10, "N": 100, "logs_dir": tmp_path, "precision": "int8", "device": "cpu"}
    with pytest.raises(UserError, match=r"give loaded\.with_scales\(training_images, 0\.5\)"):
        certify_dataset(loaded, data, **settings)
    measured = loaded.with_scales(torch.rand(30, 1, 8, 8))
    log = certify_dataset(measured, data, **settings)
    assert config(log)["scales_sha256"] == [measured.scales.sha256] and len(read_log(log)) == 3
    with pytest.raises(UserError, match=r"needs scales at noise_sd 0\.25"):
        certify_dataset(measured, data, noise_sd=0.25, **settings)
    other = loaded.with_scales(torch.rand(30, 1, 8, 8), 0.25)
    assert read_log(certify_dataset(other, data, noise_sd=0.25, **settings)).shape == read_log(log).shape
    for images, line in (
        (torch.rand(3, 3, 8, 8), r"images \[N, 1, 8, 8\]"),
        (torch.rand(0, 1, 8, 8), r"images \[N, 1, 8, 8\]"),
        (torch.full((3, 1, 8, 8), torch.nan), r"in \[0, 1\]"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "floating point"),
    ):
        with pytest.raises(UserError, match=line):
            loaded.with_scales(images)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_says_where_it_is_slow(fast, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    assert select_precision("bf16", torch.device("cpu")) == "bf16"
    assert ("fp32 is faster here" in capsys.readouterr().err) != fast
