import struct
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from spacte.data import sources as data
from spacte.data.sources import open_split
from spacte.data.spec import SPECS, DataSpec
from spacte.data.splits import InMemory, Streamed, random_crop, random_flip
from spacte.utils import UserError

CPU = torch.device("cpu")


def write_tree(root, counts, size=(12, 10), mode="RGB", extension="png"):
    """An ImageFolder tree with counts[split][class] random images; returns root."""
    rng = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3) if mode == "RGB" else size, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{extension}")
    return root


BALANCED = {"train": {"cat": 5, "dog": 4}, "test": {"cat": 2, "dog": 3}}


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    train, test = (open_split("digits", "", part, CPU) for part in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    assert torch.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert test[0][0].shape == (1, 8, 8) and int(train.images.max()) == 16
    assert open_split("digits", "", False, CPU).fingerprint() == test.fingerprint() != train.fingerprint()


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


def test_only_training_splits_are_augmented():
    spec, images = DataSpec("mine", (1, 8, 8), 2, (0.5,), (0.5,)), torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    splits = [InMemory(spec, images, torch.zeros(4, dtype=torch.int64), train, crop=4, flip=True) for train in (0, 1)]
    assert [(split.crop, split.flip) for split in splits] == [(0, False), (4, True)]


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_an_image_tree_tells_its_size_channels_and_classes(tmp_path, mode, channels):
    root = write_tree(tmp_path, BALANCED, mode=mode)
    train = open_split("ImageFolder", root, True, CPU)
    assert train.spec.shape == (channels, 12, 10) and train.spec.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0] * 5 + [1] * 4
    pixels = train.images.double() / 255
    assert torch.allclose(torch.tensor(train.spec.mean).double(), pixels.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(train.spec.std).double(), pixels.std((0, 2, 3), correction=0))
    test = open_split("ImageFolder", root, False, CPU, spec=train.spec)
    assert len(test) == 5 and test.spec == train.spec


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    write_tree(tmp_path, BALANCED)
    write_tree(tmp_path / "more", {"x": {"y": 1}}, mode="L")
    (tmp_path / "more/x/y/0.png").rename(tmp_path / "train/cat/9.png")
    images = open_split("ImageFolder", tmp_path, True, CPU).images
    assert torch.equal(images[5, 0], images[5, 2]) and not torch.equal(images[0, 0], images[0, 2])


def test_trees_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(UserError, match=r"no images in .*missing/train'"):
        open_split("ImageFolder", tmp_path / "missing", True, CPU)
    (tmp_path / "empty/train/cat").mkdir(parents=True)
    with pytest.raises(UserError, match="no images in"):
        open_split("ImageFolder", tmp_path / "empty", True, CPU)
    mixed = write_tree(tmp_path / "mixed", BALANCED)
    Image.new("RGB", (3, 4)).save(mixed / "train/dog/odd.png")
    with pytest.raises(UserError, match=r"odd.png' is 4x3 pixels.*one size"):
        open_split("ImageFolder", mixed, True, CPU)
    (mixed / "train/dog/odd.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"odd.png' cannot be read as an image"):
        open_split("ImageFolder", mixed, True, CPU)
    Image.fromarray(np.full((12, 10), 60_000, dtype=np.uint16)).save(mixed / "train/dog/odd.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        open_split("ImageFolder", mixed, True, CPU)


@pytest.mark.parametrize(
    ("name", "folder"), [("ImageFolder", "train"), ("ImageFolder", "test"), ("ImageNet", "ILSVRC2012_img_train")]
)
def test_class_folders_without_images_are_named(tmp_path, name, folder):
    root = write_tree(tmp_path, {folder: {"cat": 1, "dog": 0, "emu": 0}})
    (root / folder / "dog/notes.txt").write_text("no image")
    with pytest.raises(UserError, match=rf"^no images in the class folders 'dog', 'emu' of '.*/{folder}': .*\.png"):
        open_split(name, root, folder != "test", CPU)


def test_a_test_tree_must_have_the_training_trees_classes(tmp_path):
    root = write_tree(tmp_path, {"train": {"cat": 2, "dog": 2}, "test": {"dog": 2}})
    spec = open_split("ImageFolder", root, True, CPU).spec
    with pytest.raises(UserError, match=r"classes .* differ .*: cat"):
        open_split("ImageFolder", root, False, CPU, spec=spec)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0), "the test split is empty"),
        (torch.full((2, 1, 8, 8), 17, dtype=torch.uint8), torch.zeros(2), r"outside \[0, 1\].* from 17 to 17"),
        (torch.full((2, 1, 8, 8), 1.5), torch.zeros(2), r"outside \[0, 1\].*float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), "8x8 pixels in 1 channel, these .* 3 channels"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 10]), r"labels must lie in 0\.\.9"),
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


def test_a_set_that_cannot_be_downloaded_says_where_its_files_belong(tmp_path, monkeypatch):
    def offline(root, **_):
        raise OSError("no network")

    offline.__name__ = "CIFAR10"
    source = data.Source(partial(data._torchvision, offline, "the folder 'batches'"))
    monkeypatch.setitem(data.SOURCES, "CIFAR10", source)
    with pytest.raises(UserError, match=r"not in '.*' and could not be downloaded \(no network\): put the folder"):
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


def test_imagenet_streams_crops_of_224_pixels(tmp_path, monkeypatch):
    tree = {"ILSVRC2012_img_train": {"n1": 3, "n2": 3}, "ILSVRC2012_img_val": {"n1": 2, "n2": 1}}
    write_tree(tmp_path, tree, size=(300, 280), extension="jpg")
    with pytest.raises(UserError, match="2 class folders, ImageNet has 1000"):
        open_split("ImageNet", tmp_path, False, CPU)
    monkeypatch.setitem(SPECS, "ImageNet", replace(SPECS["ImageNet"], num_classes=2))
    train, test = (open_split("ImageNet", tmp_path, part, CPU, workers=1) for part in (True, False))
    images, labels = next(train.batches(6, torch.Generator().manual_seed(0)))
    assert images.shape == (6, 3, 224, 224) and images.dtype == torch.float32 and float(images.min()) >= 0
    assert 0.5 < float(images.max()) <= 1 and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    image, label = test[2]
    assert torch.equal(image, list(test.batches(2))[1][0][0]) and label == 1


def test_imagenet_without_its_folders_says_so(tmp_path):
    with pytest.raises(UserError, match="ILSVRC2012_img_val"):
        open_split("ImageNet", tmp_path, False, CPU)


def test_the_first_images_of_each_class_are_kept():
    labels = torch.arange(12) % 3
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(-1, 1, 8, 8)
    split = InMemory(DataSpec("toy", (1, 8, 8), 3, (0.5,), (0.5,)), images, labels)
    split.keep_first_of_each_class(6)
    assert split.images[:, 0, 0, 0].tolist() == list(range(6)) and split.labels.tolist() == [0, 1, 2] * 2
    for wrong in (4, 9, 0):
        with pytest.raises(UserError, match="a multiple of the 3 classes and at most 6, 2 of each"):
            split.keep_first_of_each_class(wrong)


def streamed(root, counts, workers=0):
    """A stream of the random images in root/x."""
    tree = data._tree(write_tree(root, {"x": counts}) / "x", loader=data._load_rgb, transform=data.v2.PILToTensor())
    return Streamed(DataSpec("toy", (3, 12, 10), len(counts), (0.5,) * 3, (0.5,) * 3), tree, CPU, workers)


@pytest.fixture
def kept(tmp_path):
    """A stream of two classes' 3 and 4 images, whole and cut to the first 2 of each."""
    whole = streamed(tmp_path / "whole", {"a": 3, "b": 4})
    cut = streamed(tmp_path / "cut", {"a": 3, "b": 4})
    cut.keep_first_of_each_class(4)
    return whole, cut


def test_a_stream_keeps_the_first_images_of_each_class(kept):
    whole, cut = kept
    assert len(cut) == 4
    for idx, old in enumerate((0, 1, 3, 4)):
        (image, label), (expected, expected_label) = cut[idx], whole[old]
        assert torch.equal(image, expected) and label == expected_label


def test_a_cut_streams_batches_are_its_images(kept):
    _, cut = kept
    assert cut.num_batches(3) == 2
    images, labels = (torch.cat(parts) for parts in zip(*cut.batches(3), strict=True))
    assert torch.equal(images, torch.stack([cut[idx][0] for idx in range(4)])) and labels.tolist() == [0, 0, 1, 1]


def test_a_cut_streams_fingerprint_is_that_of_its_files(kept, tmp_path):
    whole, cut = kept
    assert cut.fingerprint() == streamed(tmp_path / "small", {"a": 2, "b": 2}).fingerprint() != whole.fingerprint()


def test_a_cut_stream_holds_no_list_of_all_files(kept):
    assert kept[1].dataset.imgs is kept[1].dataset.samples


def break_file(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_met_by_a_stream_is_one_line_that_names_it(tmp_path, workers):
    split = streamed(tmp_path, {"a": 1, "b": 1}, workers)
    break_file(tmp_path / "x/b/0.png")
    with pytest.raises(UserError, match=r"^'[^\n]*b/0.png' cannot be read as an image: [^\n]*$"):
        list(split.batches(2))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "bomb.png")
    for limit in (300, 100):  # Pillow's warning, its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"bomb.png' cannot be read"):
            data._read_image(str(tmp_path / "bomb.png"))


def write_png(path, bits, colour, *pixels):
    """A PNG of 1x1 pixel, chunk by chunk: `pixels` are pairs of a chunk's kind, rightly b"IDAT", and its content."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *pixels, (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2)])  # RGB, grey with alpha
def test_a_16_bit_png_is_refused(tmp_path, colour, channels):
    write_png(tmp_path / "deep.png", 16, colour, (b"IDAT", zlib.compress(bytes(1 + 2 * channels))))
    with pytest.raises(UserError, match=r"deep.png' has more than 8 bits"):
        data._read_image(str(tmp_path / "deep.png"))


def test_a_16_bit_tiff_is_refused(tmp_path):
    Image.fromarray(np.full((4, 3), 60_000, dtype=np.uint16)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep.tif' has more than 8 bits"):
        data._read_image(str(tmp_path / "deep.tif"))


def test_a_png_whose_second_chunk_of_pixels_is_broken_is_named(tmp_path):
    pixels = zlib.compress(bytes(4))
    write_png(tmp_path / "broken.png", 8, 2, (b"IDAT", pixels[:3]), (b"\0\0\0\0", pixels[3:]))
    with pytest.raises(UserError, match=r"broken.png' cannot be read as an image") as error:
        data._read_image(str(tmp_path / "broken.png"))
    assert isinstance(error.value.__cause__, SyntaxError)  # Pillow's, and no OSError


def test_one_broken_image_of_a_stream_is_named(tmp_path):
    split = streamed(tmp_path, {"a": 1, "b": 1})
    break_file(tmp_path / "x/b/0.png")
    with pytest.raises(UserError, match=r"^'[^\n]*b/0.png' cannot be read as an image"):
        split[1]


def test_a_rotation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # Orientation: a quarter turn
    Image.new("RGB", (4, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert data._read_image(str(tmp_path / "turned.jpg")).shape == (3, 4, 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_odd_images_become_rgb_without_a_warning(tmp_path, mode):
    path = tmp_path / ("odd.tif" if mode == "CMYK" else "odd.png")
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    Image.new(mode, (4, 3)).save(path, **options)
    assert data._read_image(str(path)).shape == (3, 4, 3)
