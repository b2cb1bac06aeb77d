"""Splits: batches, augmentation, what is refused; data sets by name and their downloads."""

import struct
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torchvision import datasets

from spacte.data import sources as data
from spacte.data.sources import open_split
from spacte.data.spec import SPECS, DataSpec
from spacte.data.splits import InMemory, random_crop, random_flip
from spacte.files import temporary_name
from spacte.utils import UserError

CPU = torch.device("cpu")


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    train, test = (open_split("digits", "", part, CPU) for part in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    assert torch.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert test[0][0].shape == (1, 8, 8) and int(train.images.max()) == 16
    assert open_split("digits", "", False, CPU).fingerprint() == test.fingerprint() != train.fingerprint()


def test_some_images_come_from_the_whole_split():
    split = open_split("digits", "", True)
    images, labels = split.some(20)
    assert len(images) == len(labels) == 20 and torch.equal(images[-1], split[len(split) - 1][0])
    assert len(split.some(10**6)[0]) == len(split)


def test_digits_are_normalised_with_the_training_splits_moments():
    train = open_split("digits", "", True, CPU)
    pixels = train.images.double() / 16
    assert train.spec.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-4)
    assert train.spec.std[0] == pytest.approx(float(pixels.std()), abs=1e-4)


def numbered(n):
    """n images, each of whose labels tells its number."""
    spec = DataSpec("numbered", (1, 2, 2), n, (0.5,), (0.5,))
    return InMemory(spec, torch.zeros(n, 1, 2, 2, dtype=torch.uint8), torch.arange(n))


def test_sampling_weights_draw_images_in_proportion_and_as_many_as_the_split_has():
    """6,000 draws among weights 0, 1, 2, 3: each count within 6 sd of its binomial's mean (P < 1e-8)."""
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(1500)
    order = torch.Generator().manual_seed(0)
    drawn = torch.cat([labels for _, labels in numbered(6000).batches(100, order, weights=weights)])
    assert len(drawn) == 6000
    for weight, count in enumerate((drawn % 4).bincount(minlength=4).tolist()):
        p = weight / 6
        assert abs(count - 6000 * p) <= 6 * (6000 * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("weights", [None, torch.arange(21.0)])
def test_targets_go_with_their_images_and_processes_share_what_is_drawn(monkeypatch, weights):
    """Two processes get the halves of the batches that one gets."""
    split, targets = numbered(21), torch.arange(21.0).unsqueeze(1) * 10

    def batches():
        return list(split.batches(8, torch.Generator().manual_seed(5), weights=weights, targets=targets))

    one = batches()
    assert all(torch.equal(rows.squeeze(1), labels * 10.0) for _, labels, rows in one)
    monkeypatch.setattr("spacte.data.splits.get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("spacte.data.splits.get_rank", lambda rank=rank: rank)
        for (_, labels, rows), (_, all_labels, all_rows) in zip(batches(), one, strict=True):
            assert torch.equal(labels, all_labels[rank::2]) and torch.equal(rows, all_rows[rank::2])


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, -1], [0, 0, 0], [1, 1, float("nan")]])
def test_sampling_weights_that_are_none_are_refused(weights):
    order = torch.Generator()
    with pytest.raises(ValueError, match="must be 3 finite numbers of at least 0, not all 0"):
        next(numbered(3).batches(2, order, weights=torch.tensor(weights, dtype=torch.float64)))


def test_batches_cover_the_split_once_and_stay_in_0_1():
    test = open_split("digits", "", False, CPU)
    order = torch.Generator().manual_seed(0)
    batches = list(test.batches(100, order))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    images = torch.cat([images for images, _ in batches])
    assert float(images.min()) == 0 and float(images.max()) == 1
    assert not torch.equal(torch.cat([labels for _, labels in batches]), test.labels)
    assert torch.equal(torch.cat([labels for _, labels in batches]).bincount(), test.labels.bincount())
    assert torch.equal(next(test.batches(360))[1], test.labels)


@pytest.mark.parametrize(("smallest", "batches"), [(1, 4), (60, 4), (61, 3)])
def test_a_small_last_batch_can_be_left_out(smallest, batches):
    test = open_split("digits", "", False, CPU)
    assert test.num_batches(100, smallest) == len(list(test.batches(100, smallest=smallest))) == batches


def test_a_crop_shifts_each_image_by_its_own_amount():
    images = torch.zeros(2000, 2, 9, 7, dtype=torch.uint8)
    images[:, :, 4, 3] = 200
    cropped = random_crop(images, 2)
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    places = (cropped[:, 0] == 200).nonzero()
    assert len(places) == 2000 and torch.equal(cropped[:, 0], cropped[:, 1])
    shifts = {(int(row) - 4, int(column) - 3) for _, row, column in places}
    # that one of the 25 shifts is missing has P < 1e-30
    assert shifts == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.arange(6).view(1, 1, 2, 3).repeat(1000, 1, 1, 1)
    flipped = (random_flip(images) == images.flip(-1)).flatten(1).all(1)
    assert 350 < int(flipped.sum()) < 650  # P < 1e-20


@pytest.mark.parametrize("how", [{"flip": True}, {"crop": 4}])
def test_only_training_splits_are_augmented(how):
    spec, labels = DataSpec("mine", (1, 8, 8), 2, (0.5,), (0.5,)), torch.zeros(40, dtype=torch.int64)
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    test, train = (next(InMemory(spec, images, labels, part, **how).batches(40))[0] for part in (False, True))
    assert torch.equal(test, images / 255) and not torch.equal(train, test)


def test_the_augmentation_of_each_data_set():
    found = {name: (source.crop, source.flip) for name, source in data.SOURCES.items() if source.crop or source.flip}
    assert found == {"CIFAR10": (4, True), "CIFAR100": (4, True), "SVHN": (4, False)}


def test_the_hash_of_a_split_is_of_its_labels_too():
    other = numbered(3)
    other.labels = other.labels.flip(0)
    assert other.fingerprint() != numbered(3).fingerprint()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0), "the test split is empty"),
        (torch.full((2, 1, 8, 8), 17, dtype=torch.uint8), torch.zeros(2), r"outside \[0, 1\].* from 17 to 17"),
        (torch.full((2, 1, 8, 8), 1.5), torch.zeros(2), r"outside \[0, 1\].*float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), "8x8 pixels in 1 channel, these .* 3 channels"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.uint8), torch.zeros(2), "these are .*; put the channels first"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 10]), r"labels must lie in 0\.\.9"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0]), "2 test images have 1 labels"),
    ],
)
def test_data_that_contradict_the_spec_are_refused(images, labels, message):
    with pytest.raises(UserError, match=message):
        InMemory(data.data_spec("digits"), images, labels)


def test_torchvision_sets_are_read_as_uint8_channels_first(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, download, **which):
            self.data = np.random.default_rng(0).integers(0, 256, self.shape, dtype=np.uint8)
            self.targets = self.labels = [3, 9]

    for name, shape in (("CIFAR10", (2, 32, 32, 3)), ("SVHN", (2, 3, 32, 32)), ("MNIST", (2, 28, 28))):
        fake = type(name, (Fake,), {"shape": shape})
        if name == "SVHN":
            monkeypatch.setattr(datasets, "SVHN", fake)
        source = data.SOURCES[name]
        monkeypatch.setitem(data.SOURCES, name, replace(source, read=partial(data._torchvision, fake, "the files")))
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
    source = data.SOURCES["CIFAR10"]
    monkeypatch.setitem(data.SOURCES, "CIFAR10", replace(source, read=partial(data._fixed_size, Official, "files")))


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
    source = data.Source(partial(data._torchvision, offline, "the folder 'batches'"))
    monkeypatch.setitem(data.SOURCES, "CIFAR10", source)
    with pytest.raises(
        UserError, match=r"CIFAR10 in '.*' is not there and could not .* \(no network\): put the folder"
    ):
        open_split("CIFAR10", tmp_path, True, CPU)


def write_idx(path, array, shape=None):
    """An array as MNIST's files hold it: type and dimensions, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">{array.ndim}I", *(shape or array.shape))
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def test_a_damaged_file_of_mnists_is_named(tmp_path):
    raw = tmp_path / "MNIST/raw"
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.zeros((4, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(4, dtype=np.uint8))
    assert len(open_split("MNIST", tmp_path, False, CPU)) == 4
    whole = (raw / "t10k-images-idx3-ubyte").read_bytes()
    for content in (whole[:1000], whole + b"0", b"", b"<html>not found</html>"):
        (raw / "t10k-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(UserError, match=r"MNIST's file '.*t10k-images-idx3-ubyte' is damaged: put"):
            open_split("MNIST", tmp_path, False, CPU)


def test_a_set_of_which_a_file_is_damaged_is_not_said_to_be_missing(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(data, "_downloaded", offline)
    with pytest.raises(UserError, match=r"CIFAR10 in '.*' is incomplete or damaged and could not be downloaded"):
        open_split("CIFAR10", tmp_path, True, CPU)


def failing_download(error):
    """A torchvision set whose download writes an archive, replaces another, unpacks half of it and raises `error`."""

    class CIFAR10:
        filename = "batches.tar.gz"

        def __init__(self, root, download, **_):
            if not download:
                raise RuntimeError("not found")
            (root / "batches").mkdir(parents=True)
            (root / self.filename).write_bytes(b"half")
            (root / "batches/data_1").write_bytes(b"half")
            (root / "empty").mkdir()
            raise error

    return partial(data._torchvision, CIFAR10, "the folder 'batches'")


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
                raise RuntimeError("not found")
            (root / "batches").mkdir()
            (root / "batches/data_1").write_bytes((root / self.filename).read_bytes())

    (tmp_path / "batches.tar.gz").write_bytes(b"mine")
    data._torchvision(CIFAR10, "the folder 'batches'", tmp_path, True)
    assert files_in(tmp_path) == {"batches.tar.gz": b"mine", "batches": False, "batches/data_1": b"mine"}


def test_the_first_images_of_each_class_are_kept():
    labels = torch.arange(12) % 3
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(-1, 1, 8, 8)
    split = InMemory(DataSpec("toy", (1, 8, 8), 3, (0.5,), (0.5,)), images, labels)
    split.keep_first_of_each_class(6)
    assert split.images[:, 0, 0, 0].tolist() == list(range(6)) and split.labels.tolist() == [0, 1, 2] * 2
    for wrong in (4, 9, 0):
        with pytest.raises(UserError, match="a multiple of the 3 classes and at most 6, 2 of each"):
            split.keep_first_of_each_class(wrong)


def test_a_class_without_images_has_no_first_ones():
    split = InMemory(data.data_spec("digits"), torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.arange(1, 10))
    with pytest.raises(UserError, match="--train_images 10: class 0 has no image"):
        split.keep_first_of_each_class(10)


def test_a_spec_describes_any_split(monkeypatch):
    other = replace(data.data_spec("digits"), mean=(0.1,))
    assert open_split("digits", "", False, spec=other).spec == other
    for change, message in (({"num_classes": 3}, "10 classes, the classifier has 3"), ({"shape": (1, 9, 9)}, "9x9")):
        with pytest.raises(UserError, match=message):
            open_split("digits", "", False, spec=replace(other, **change))
    monkeypatch.setitem(SPECS, "Wine", replace(other, name="Wine"))
    with pytest.raises(UserError, match="'Wine' has a spec, but no Source in"):
        open_split("Wine", "", False)
