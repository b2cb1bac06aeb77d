"""Certification from Python: any data, any classifier, the same resumable logs."""

import dataclasses
import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SETTINGS, beside, linear, without_time
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import to_pil_image

from spacte import certify_dataset, load_classifier, read_log
from spacte.utils import UserError

LAST_OFF_THE_GRID = torch.cat([torch.zeros(3, 1, 8, 8), torch.rand(1, 1, 8, 8)])


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_module_and_tensors_leave_a_log_that_is_gone_on_with(digits, tmp_path, script):
    classifier = linear().train()
    own = {"noise_sd": 0.5, "num_classes": 10, "dataset": "my digits", "name": "linear", **SETTINGS}
    log = certify_dataset(classifier, digits, max=100, **own)
    assert str(log) == "logs/my_digits/Sequential/noise-0.50/certify-mhead/linear-certify-skip-30.log"
    begun = log.read_text()
    assert certify_dataset(classifier, digits, **own) == log
    assert log.read_text().startswith(begun) and read_log(log)["idx"].tolist() == list(range(0, 360, 30))
    assert classifier.training and classifier[2].weight.requires_grad  # the caller's own is as it was
    pairs = list(zip(*digits, strict=True))
    assert without_time(certify_dataset(classifier, pairs, **own | {"name": "pairs"})) == without_time(log)
    with pytest.raises(UserError, match="parameters_sha256"):
        classifier[2].weight.data += 1
        certify_dataset(classifier, digits, **own)
        classifier[2].weight.data -= 1
    code, out, err = script("report.py", log)
    assert code == 0 and "linear" in out, err
    assert script("relog.py", log, "--alpha", 0.01)[0] == 0
    shards = [str(certify_dataset(linear(), digits, shard=f"{i}/2", **own | {"name": "shards"})) for i in (1, 2)]
    assert script("merge_logs.py", *shards)[0] == 0
    assert without_time(log.with_name("shards-certify-skip-30.log")) == without_time(log)


def test_a_checkpoint_takes_the_fast_path_and_gives_its_scripts_log(digits, digits_models, script, tmp_path):
    """uint8 images are k / 255, so that the digits, k / 16, are given as numbers."""
    log = certify_dataset(load_classifier(digits_models[0]), digits, **SETTINGS)
    flags = [f for key, value in SETTINGS.items() for f in (f"--{key}", value)]
    code, _, err = script("certify_mhead.py", "--model_path", digits_models[0], *flags, "--logs_dir", "script")
    assert code == 0, err
    (other,) = (tmp_path / "script").rglob("*skip-30.log")
    assert without_time(log) == without_time(other) and log.name == other.name
    both = certify_dataset([load_classifier(path) for path in digits_models], digits, **SETTINGS)
    assert json.loads(beside(both, ".json").read_text())["config"]["num_heads"] == [3, 1]
    shifted = certify_dataset(load_classifier(digits_models[0]), digits, dataset="shifted", **SETTINGS)
    assert shifted.is_relative_to("logs/shifted") and without_time(shifted) == without_time(log)
    assert json.loads(beside(shifted, ".json").read_text())["config"]["dataset"] == "shifted"


def test_images_may_be_bytes_or_pictures():
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    labels, own = torch.arange(4), {"noise_sd": 0.5, "num_classes": 10, **SETTINGS, "skip": 1}
    forms = {
        "bytes": (images, labels),
        "array": (images.numpy(), labels.numpy()),
        "pictures": [(to_pil_image(image), int(label)) for image, label in zip(images, labels, strict=True)],
        "numbers": (images / 255, labels),
    }
    logs = [certify_dataset(linear(), data, name=name, exact_noise=True, **own) for name, data in forms.items()]
    assert len({tuple(without_time(log)) for log in logs}) == 1


class Augmented:
    def __len__(self):
        return 4

    def __getitem__(self, idx):
        return torch.rand(1, 8, 8), idx


class Unreadable(Augmented):
    def __getitem__(self, idx):
        raise OSError("broken file")


PAIRS = TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4))


def stops(images):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 2}, "alpha: '2' must be above 0 and below 1"),
        ({"n": 100}, "unknown setting 'n': choose from N, N0, alpha"),
        ({"arch": "R8"}, "unknown setting 'arch': choose from"),
        ({"radii": [0.5, -1]}, "radii: '-1' must be a number of at least 0"),
        ({"radii": [0.5]}, "--radii says when to stop: it needs --sequential"),
        ({"sequential": 3}, "sequential: '3' must be one of True, False"),
        ({"noise_sd": None}, "does not say its noise_sd and num_classes: give both"),
        ({"num_classes": 3}, "has label .: it must lie in 0..2"),
        ({"num_classes": 11}, "knows 10 classes, the data have 11"),
        ({"classifier": torch.nn.Linear(64, 10, device="meta")}, "are on the meta device: load its weights"),
        ({"classifier": "a.pth"}, "the classifier is a str: it must be a module, another callable"),
        ({"data": (torch.full((4, 1, 8, 8), torch.inf), torch.arange(4))}, "image 0 has values that are not finite"),
        ({"data": (torch.rand(4), torch.arange(4))}, r"its image is a Tensor of shape \[\], not real values of one"),
        ({"levels": 0}, "levels: 0 must be an integer of at least 1"),
        ({"data": Augmented()}, "item 0 differs each time it is read: switch the data's augmentation off"),
        ({"data": []}, "the data are empty"),
        (
            {"data": (torch.full((4, 1, 8, 8), 17, dtype=torch.uint8), torch.arange(4)), "levels": 16},
            "up to 17, and le",
        ),
        (
            {"data": [{"image": 1, "label": 2}]},
            "it is a dict of image, label; give a Dataset that returns two of these",
        ),
        ({"data": None}, "the data are a NoneType: they must be a Dataset with a length"),
        ({"data": iter([])}, "the data are a list_iterator: they must be a Dataset with a length"),
        ({"data": DataLoader(PAIRS)}, "the data are a DataLoader: they must be a Dataset with a length"),
        ({"data": list(PAIRS.tensors)}, "item 0 of the data must be an image and its label: it is a Tensor of shape"),
        ({"data": ("ab", "cd")}, r"the data are a tuple: it must be \(images, labels\)"),
        ({"data": PAIRS.tensors * 2}, r"the data are a tuple: it must be \(images, labels\)"),
        ({"data": (PAIRS.tensors[0], torch.eye(4))}, r"its label is a Tensor of shape \[4\], not an integer"),
        ({"data": (PAIRS.tensors[0], torch.arange(4) / 2)}, "item 1 of the data must be .* its label 0.5 must be an"),
        ({"data": [("a.png", 3)]}, "its image is a str, not a tensor, an array or a picture"),
        ({"data": Unreadable()}, r"item 0 of the data cannot be read: OSError: broken file \(test_dataset.py, line"),
        ({"num_classes": 10.0}, "num_classes: 10.0 must be an integer of at least 1"),
        ({"classifier": stops}, r"the classifier fails on images .*: SystemExit: 3 \(test_dataset.py, line"),
        (
            {"data": (torch.rand(4, 1, 8, 8), torch.arange(3))},
            r"must be \(images, labels\), two tensors or arrays of one",
        ),
        ({"exact_noise": True, "data": (torch.rand(4, 1, 8, 8), torch.arange(4))}, "multiples of 1/255"),
        ({"exact_noise": True, "data": (LAST_OFF_THE_GRID, torch.arange(4)), "skip": 1}, "multiples of 1/255"),
        ({"skip": None}, "skip: None is not a value; leave it out for 1"),
        ({"certificate": "all-votes", "N": 10}, "--N 10 at --alpha 0.001 can never certify: .* take at least 11"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written(digits, tmp_path, change, message):
    call = {"classifier": linear(), "data": digits, "noise_sd": 0.5, "num_classes": 10, **SETTINGS} | change
    with pytest.raises(ValueError, match=message):
        certify_dataset(call.pop("classifier"), call.pop("data"), **call)
    assert not (tmp_path / "logs").exists()


def test_pictures_outside_the_unit_range_get_a_warning_whichever_they_are(digits, tmp_path):
    images, own = digits[0].clone().requires_grad_(), {"noise_sd": 0.5, "num_classes": 10, **SETTINGS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        certify_dataset(linear(), (images, digits[1]), max=30, name="all", **own)
        assert "the images have values" not in str([one.message for one in caught])
        brighter = torch.cat([images[:100], 255 * images[100:]])
        certify_dataset(linear(), (brighter, digits[1]), max=30, name="brighter", **own)
    assert "the images have values from 0 to 255: sigma and radii are in these" in str([one.message for one in caught])


def test_a_checkpoint_at_another_sigma(digits, digits_models, capsys):
    """Log, folder and JSON say both sigmas; the same draws, scaled, by the same network."""
    log = certify_dataset(load_classifier(digits_models[1]), digits, noise_sd=0.25, **SETTINGS)
    assert "noise-0.25" in log.parts and "-trained-at-0.5-" in log.name
    assert "trained with noise 0.5, certified with 0.25" in capsys.readouterr().err
    noted = json.loads(beside(log, ".json").read_text())
    assert noted["config"]["noise_sd"] == 0.25 and noted["about"]["training"][0]["noise_sd"] == 0.5
    same = certify_dataset(load_classifier(digits_models[1], noise_sd=0.25), digits, overwrite=True, **SETTINGS)
    assert same == log
    with pytest.raises(UserError, match="levels 255 contradicts the checkpoint, which has 16"):
        certify_dataset(load_classifier(digits_models[1]), digits, levels=255, **SETTINGS)
    with pytest.raises(UserError, match="num_classes 3 contradicts the checkpoint, which has 10"):
        certify_dataset(load_classifier(digits_models[1]), digits, num_classes=3)
    outside = (torch.rand(4, 1, 8, 8) * 2, torch.arange(4))
    with pytest.raises(UserError, match=r"they must lie in \[0, 1\]; normalisation belongs"):
        certify_dataset(load_classifier(digits_models[1]), outside)


def test_a_checkpoint_that_does_not_say_its_sigma_takes_the_calls(digits, digits_models):
    loaded = load_classifier(digits_models[0])
    silent = dataclasses.replace(loaded, noise_sd=None)
    log = certify_dataset([silent, loaded], digits, noise_sd=0.5, **SETTINGS)
    assert "noise-0.50" in log.parts
    with pytest.raises(UserError, match="the checkpoint does not say its noise_sd"):
        certify_dataset(silent, digits, **SETTINGS)


@pytest.mark.parametrize("shape", [(5,), (2, 40), (6, 4, 4), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("sigma", [10.0, 100.0])
def test_data_of_any_shape_and_range(tmp_path, shape, sigma):
    """A linear classifier of two classes, whose radii are known: sigma and radius are in the data's own units."""
    torch.manual_seed(0)
    data = 3 * sigma * torch.randn(12, *shape) - 7
    direction = torch.randn(shape).flatten()
    direction /= direction.norm()
    labels = (data.flatten(1) @ direction > 0).long()

    def sides(x):
        margin = x.flatten(1) @ direction
        return torch.stack([-margin, margin], 1)

    own = {"noise_sd": sigma, "num_classes": 2, "N0": 20, "N": 2000, "device": "cpu", "logs_dir": tmp_path}
    log = read_log(certify_dataset(sides, (data, labels), **own))
    distances = (data.flatten(1) @ direction).abs()
    for row in log.itertuples():
        distance = float(distances[row.idx])
        assert row.predict in (-1, row.label) and row.radius <= distance + 1e-5 * sigma
        assert row.radius > sigma * (min(distance / sigma, 2.7) - 0.5), "what 2,000 draws can tell"
    assert log["radius"].max() > 1
    with pytest.warns(UserWarning, match="sigma and radii are in these units") if len(shape) == 3 else nullcontext():
        certify_dataset(sides, (data, labels), overwrite=True, **own)


def test_exact_noise_needs_levels_of_the_data(tmp_path):
    data = (torch.randint(-40, 40, (6, 9)) / 4, torch.arange(6) % 2)
    own = {"noise_sd": 1.0, "num_classes": 2, "N0": 10, "N": 100, "device": "cpu", "logs_dir": tmp_path}

    def sides(x):
        return torch.stack([-x.sum(1), x.sum(1)], 1)

    certify_dataset(sides, data, levels=4, exact_noise=True, **own)
    with pytest.raises(UserError, match="multiples of 1/2"):
        certify_dataset(sides, data, levels=2, exact_noise=True, dataset="other", **own)
    far = (data[0] + 2**23, data[1])
    with pytest.raises(UserError, match=r"exact noise on a grid of 1/4 needs values below 4.19e\+06"):
        certify_dataset(sides, far, levels=4, exact_noise=True, dataset="far", **own)


def test_two_classes_need_no_share_of_alpha(tmp_path):
    """Ten votes of ten certify at alpha .001, with the certificate from all the votes, too."""
    data = (torch.rand(4, 1, 8, 8), torch.arange(4) % 2)
    own = {"noise_sd": 0.25, "num_classes": 2, "N": 10, "N0": 10, "logs_dir": tmp_path, "device": "cpu"}
    log = certify_dataset(lambda images: torch.eye(2)[[1] * len(images)], data, certificate="all-votes", **own)
    assert (read_log(log)["radius"] > 0).all()


def test_a_call_that_fails_leaves_no_lock(digits):
    """Counts and log contradict each other; the way out that the error names works in the same process."""
    own = {"noise_sd": 0.5, "num_classes": 10, **SETTINGS}
    log = certify_dataset(linear(), digits, **own)
    log.write_text(log.read_text().replace("\t1\t", "\t7\t"))
    with pytest.raises(UserError, match="do not belong together") as failed:
        certify_dataset(linear(), digits, **own)
    certify_dataset(linear(), digits, overwrite=True, **own)
    assert failed.value


def test_what_is_natural_in_python_is_taken_and_nothing_leaves_the_logs_folder(tmp_path):
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    settings = {"noise_sd": 0.25, "num_classes": 10, "N": 100, "skip": 6, "logs_dir": tmp_path / "logs"}
    settings["device"] = torch.device("cpu")

    def classifier(images):
        return images.flatten(1)[:, :10]

    log = certify_dataset(classifier, (images, labels), dataset="..", name="../x", **settings)
    assert log.is_relative_to(tmp_path / "logs") and [path.name for path in tmp_path.iterdir()] == ["logs"]
    series = pd.Series(labels.numpy(), index=range(5, 17))
    certify_dataset(classifier, (images, series), name="series", skip_wrong=np.True_, **settings)
    (written,) = tmp_path.rglob("series*-6.json")
    assert json.loads(written.read_text())["config"]["skip_wrong"] is True
    with pytest.raises(UserError, match=r"its label 0\.5 must be an integer"):
        certify_dataset(classifier, (images, labels + 0.5), name="y", **settings)


def test_one_radius_need_not_be_a_list(digits):
    settings = SETTINGS | {"noise_sd": 0.5, "num_classes": 10, "sequential": True, "skip": 180}
    log = certify_dataset(linear(), digits, radii=0.25, **settings)
    assert json.loads(beside(log, ".json").read_text())["config"]["sequential"]["radii"] == [0.25]


def test_a_classifier_that_fails_later_is_one_line_and_what_is_counted_stays(digits):
    """The run goes on where it stood once the classifier is mended."""
    network, calls, settings = linear().eval(), [], SETTINGS | {"noise_sd": 0.5, "num_classes": 10}

    def classifier(images):
        calls.append(1)
        if 11 < len(calls) < 14:
            raise KeyError("weights")
        return network(images)

    with pytest.raises(UserError, match=r"classifier fails on images .*: KeyError: 'weights' \(test_dataset.py, li"):
        certify_dataset(classifier, digits, **settings)
    (counts,) = Path("logs").rglob("*-counts.jsonl")
    begun = counts.read_text()
    calls.extend([1] * 2)
    log = certify_dataset(classifier, digits, **settings)
    assert begun and beside(log, "-counts.jsonl").read_text().startswith(begun) and len(read_log(log)) == 12


def test_a_constant_classifier_gets_a_remark(digits):
    with pytest.warns(UserWarning, match="answers every image alike: are its trained weights loaded"):
        certify_dataset(torch.nn.Sequential(linear(), Constant()), digits, noise_sd=0.5, num_classes=10, **SETTINGS)


class Constant(torch.nn.Module):
    def forward(self, logits):
        return torch.zeros_like(logits) + torch.arange(10.0)
