"""Splits: their batches, augmentation and the first images of each class; what is refused."""

import pytest
import torch

from spacte.data.sources import data_spec, open_split
from spacte.data.spec import DataSpec
from spacte.data.splits import InMemory, random_crop, random_flip
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
    images, labels = split.evenly_spaced(20)
    assert len(images) == len(labels) == 20 and torch.equal(images[-1], split[len(split) - 1][0])
    assert len(split.evenly_spaced(10**6)[0]) == len(split)


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
        InMemory(data_spec("digits"), images, labels)


def test_the_first_images_of_each_class_are_kept():
    labels = torch.arange(12) % 3
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(-1, 1, 8, 8)
    split = InMemory(DataSpec("toy", (1, 8, 8), 3, (0.5,), (0.5,)), images, labels)
    split.keep_first_of_each_class(6)
    assert split.images[:, 0, 0, 0].tolist() == list(range(6)) and split.labels.tolist() == [0, 1, 2] * 2
    for wrong in (4, 9, 0):
        with pytest.raises(UserError, match="a multiple of the 3 classes and at most 6, 2 of each"):
            split.keep_first_of_each_class(wrong)


@pytest.mark.parametrize("k", [0, 4, 9])
def test_a_class_without_images_has_no_first_ones(k):
    labels = torch.arange(10)[torch.arange(10) != k]
    split = InMemory(data_spec("digits"), torch.zeros(9, 1, 8, 8, dtype=torch.uint8), labels)
    with pytest.raises(UserError, match=f"--train_images 10: class {k} has no image"):
        split.keep_first_of_each_class(10)
