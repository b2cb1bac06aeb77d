"""Data sets by name: torchvision's files, saved arrays, downloads that fail."""

import struct
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torchvision import datasets

from spacte.data import sources
from spacte.data.sources import open_split
from spacte.data.spec import SPECS
from spacte.files import temporary_name
from spacte.utils import UserError

CPU = torch.device("cpu")


def test_torchvision_sets_are_read_as_uint8_channels_first(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, download, **which):
            self.data = np.random.default_rng(0).integers(0, 256, self.shape, dtype=np.uint8)
            self.targets = self.labels = [3, 9]

    for name, shape in (("CIFAR10", (2, 32, 32, 3)), ("SVHN", (2, 3, 32, 32)), ("MNIST", (2, 28, 28))):
        fake = type(name, (Fake,), {"shape": shape})
        if name == "SVHN":
            monkeypatch.setattr(datasets, "SVHN", fake)
        source = sources.SOURCES[name]
        monkeypatch.setitem(
            sources.SOURCES, name, replace(source, read=partial(sources._torchvision, fake, "the files"))
        )
        split = open_split(name, tmp_path, True, CPU)
        expected = (2, 1, 28, 28) if name == "MNIST" else (2, 3, 32, 32)
        assert split.images.shape == expected and split.labels.tolist() == [3, 9]


class Official:
    """What torchvision's CIFAR10 returns, without its files."""

    def __init__(self, root, download, train):
        rng = np.random.default_rng(train)
        self.data = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        self.targets = rng.integers(0, 10, 5).tolist()


Official.__name__ = "CIFAR10"


@pytest.fixture
def official(monkeypatch):
    source = sources.SOURCES["CIFAR10"]
    monkeypatch.setitem(
        sources.SOURCES, "CIFAR10", replace(source, read=partial(sources._fixed_size, Official, "files"))
    )


def arrays_of(splits):
    """What an .npz file holds of a training and a test split."""
    images = {part: split.images.numpy() for part, split in splits.items()}
    return images | {f"{part}_labels": split.labels.numpy() for part, split in splits.items()}


def test_saved_arrays_are_the_official_files_images(tmp_path, official):
    splits = {part: open_split("CIFAR10", tmp_path, part == "train", CPU) for part in ("train", "test")}
    np.savez_compressed(tmp_path / "CIFAR10.npz", **arrays_of(splits))
    for part, split in splits.items():
        saved = open_split("CIFAR10", tmp_path, part == "train", CPU)
        assert saved.fingerprint() == split.fingerprint()
        assert (saved.crop, saved.flip, saved.spec) == (split.crop, split.flip, split.spec)
        assert saved.labels.dtype == torch.int64


def test_greyscale_arrays_need_no_channel(tmp_path):
    images, labels = np.zeros((2, 28, 28), dtype=np.uint8), np.array([3, 9], dtype=np.uint8)
    np.savez(tmp_path / "MNIST.npz", train=images, train_labels=labels, test=images, test_labels=labels)
    with pytest.raises(UserError, match="train: 'test' must be True, the training split, or False, the test split"):
        open_split("MNIST", tmp_path, "test", CPU)
    split = open_split("MNIST", tmp_path, False, CPU)
    assert split.images.shape == (2, 1, 28, 28) and split.labels.tolist() == [3, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": None, "test_labels": None}, "lacks test, test_labels: it must hold train, train_labels, test, "),
        ({"train": np.zeros((5, 3, 32, 32))}, r"train must be uint8 .*, not float64 \[5, 3, 32, 32\]"),
        ({"train": np.zeros((5, 32), dtype=np.uint8)}, r"train must be uint8 .*, not uint8 \[5, 32\]"),
        ({"train": np.zeros((5, 3, 28, 28), dtype=np.uint8)}, "images should be 32x32 pixels in 3 channels"),
        (
            {"train": np.zeros((0, 3, 32, 32), dtype=np.uint8), "train_labels": np.zeros(0, int)},
            "the training split is empty",
        ),
        ({"train_labels": np.zeros(5)}, r"train_labels must be 5 integers, not float64 \[5\]"),
        ({"train_labels": np.zeros(4, dtype=int)}, r"train_labels must be 5 integers, not int64 \[4\]"),
        ({"train_labels": np.full(5, 10)}, r"labels must lie in 0\.\.9"),
        ({"train": np.array([None] * 5)}, "is not a readable .npz file: it must hold train, train_labels, test, "),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(tmp_path, official, changes, message):
    arrays = arrays_of({part: open_split("CIFAR10", tmp_path, True, CPU) for part in ("train", "test")}) | changes
    np.savez(tmp_path / "CIFAR10.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message) as error:
        open_split("CIFAR10", tmp_path, True, CPU)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, **dict.fromkeys(("train", "train_labels", "test", "test_labels"), np.zeros(9)))
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(9))
    for content in (b"", b"no archive", whole.read_bytes()[:300], array.read_bytes()):
        (tmp_path / "CIFAR10.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"CIFAR10.npz' is not a readable .npz file"):
            open_split("CIFAR10", tmp_path, True, CPU)


def test_a_set_that_cannot_be_downloaded_says_where_its_files_belong(tmp_path, monkeypatch):
    def offline(root, **_):
        raise OSError("no network")

    offline.__name__ = "CIFAR10"
    source = sources.Source(partial(sources._torchvision, offline, "the folder 'batches'"))
    monkeypatch.setitem(sources.SOURCES, "CIFAR10", source)
    with pytest.raises(
        UserError, match=r"CIFAR10 in '.*' is not there and could not .* \(no network\): put the folder"
    ):
        open_split("CIFAR10", tmp_path, True, CPU)


def write_idx(path, array, shape=None):
    """An array as MNIST's files hold it: type and dimensions, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">{array.ndim}I", *(shape or array.shape))
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def test_damaged_files_of_mnists_stay_where_they_are(tmp_path, monkeypatch):
    """The others may be a user's own: nothing is downloaded over them."""
    monkeypatch.setattr(sources, "_downloaded", lambda *args: pytest.fail("a download"))
    raw = tmp_path / "MNIST/raw"
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.zeros((4, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(4, dtype=np.uint8))
    assert len(open_split("MNIST", tmp_path, False, CPU)) == 4
    whole = (raw / "t10k-images-idx3-ubyte").read_bytes()
    for content in (whole[:1000], whole + b"0", b"", b"<html>not found</html>"):
        (raw / "t10k-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(UserError, match=r"MNIST in '.*' is damaged \(.*\): put 'MNIST/raw' with the fo"):
            open_split("MNIST", tmp_path, False, CPU)


def test_a_set_of_which_a_file_is_damaged_is_not_said_to_be_missing(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(sources, "_downloaded", offline)
    with pytest.raises(UserError, match=r"CIFAR10 in '.*' is incomplete or damaged and could not be downloaded"):
        open_split("CIFAR10", tmp_path, True, CPU)


def failing_download(error):
    """A torchvision set whose download writes an archive, replaces another, unpacks half of it and raises `error`."""

    class CIFAR10:
        filename = "batches.tar.gz"

        def __init__(self, root, download, **_):
            if not download:
                raise RuntimeError("Dataset not found")
            (root / "batches").mkdir(parents=True)
            (root / self.filename).write_bytes(b"half")
            (root / "batches/data_1").write_bytes(b"half")
            (root / "empty").mkdir()
            raise error

    return partial(sources._torchvision, CIFAR10, "the folder 'batches'")


def files_in(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


FAILURES = [(OSError("no network"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)]


@pytest.mark.parametrize(("error", "raised"), FAILURES)
def test_a_failed_download_leaves_a_folder_as_it_was(tmp_path, error, raised):
    (tmp_path / "other/empty").mkdir(parents=True)
    for name in ("other/file", "batches.tar.gz"):
        (tmp_path / name).write_bytes(b"mine")
    before = files_in(tmp_path)
    with pytest.raises(raised):
        failing_download(error)(tmp_path, True)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(("error", "raised"), FAILURES)
def test_a_failed_download_leaves_no_folder_that_it_made(tmp_path, error, raised):
    with pytest.raises(raised):
        failing_download(error)(tmp_path / "new/data", True)
    assert files_in(tmp_path) == {}


def test_what_a_killed_download_of_this_number_has_left_is_no_obstacle(tmp_path):
    """In a container every process has the number 1, on a host that keeps its name."""
    (tmp_path / temporary_name("download") / "batches").mkdir(parents=True)
    with pytest.raises(UserError, match="no network"):
        failing_download(OSError("no network"))(tmp_path, True)
    assert files_in(tmp_path) == {}


def test_a_download_adds_its_files_to_the_folder_and_uses_an_archive_that_is_there(tmp_path):
    class CIFAR10:
        filename, data, targets = "batches.tar.gz", np.zeros((1, 32, 32, 3), dtype=np.uint8), [0]

        def __init__(self, root, download, **_):
            if not download:
                raise RuntimeError("Dataset not found")
            (root / "batches").mkdir()
            (root / "batches/data_1").write_bytes((root / self.filename).read_bytes())

    (tmp_path / "batches.tar.gz").write_bytes(b"mine")
    sources._torchvision(CIFAR10, "the folder 'batches'", tmp_path, True)
    assert files_in(tmp_path) == {"batches.tar.gz": b"mine", "batches": False, "batches/data_1": b"mine"}


def test_the_augmentation_of_each_data_set():
    found = {name: (source.crop, source.flip) for name, source in sources.SOURCES.items() if source.crop or source.flip}
    assert found == {"CIFAR10": (4, True), "CIFAR100": (4, True), "SVHN": (4, False)}


def test_a_spec_describes_any_split(monkeypatch):
    other = replace(sources.data_spec("digits"), mean=(0.1,))
    assert open_split("digits", "", False, spec=other).spec == other
    for change, message in (({"num_classes": 3}, "10 classes, the classifier has 3"), ({"shape": (1, 9, 9)}, "9x9")):
        with pytest.raises(UserError, match=message):
            open_split("digits", "", False, spec=replace(other, **change))
    monkeypatch.setitem(SPECS, "Wine", replace(other, name="Wine"))
    with pytest.raises(UserError, match="'Wine' has a spec, but no Source in"):
        open_split("Wine", "", False)
