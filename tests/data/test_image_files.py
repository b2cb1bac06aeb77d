"""Image files: trees of class folders, held in memory or streamed, and files that are broken or odd."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from spacte.data.image_files import ImageTree, _read_image, load_rgb
from spacte.data.sources import open_split
from spacte.data.spec import SPECS, DataSpec
from spacte.data.splits import StreamedSplit
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


@pytest.mark.parametrize(("name", "folder"), [("ImageFolder", "train"), ("ImageNet", "ILSVRC2012_img_train")])
def test_class_folders_without_images_are_named(tmp_path, name, folder):
    root = write_tree(tmp_path, {folder: {"cat": 1, "dog": 0, "emu": 0}})
    (root / folder / "dog/notes.txt").write_text("no image")
    with pytest.raises(UserError, match=rf"^no images in the class folders 'dog', 'emu' of '.*/{folder}': .*\.png"):
        open_split(name, root, True, CPU)


def test_a_class_may_have_no_test_image(tmp_path):
    root = write_tree(tmp_path, {"train": {"cat": 2, "dog": 2, "emu": 2}, "test": {"cat": 1, "dog": 0, "emu": 3}})
    spec = open_split("ImageFolder", root, True, CPU).spec
    split = open_split("ImageFolder", root, False, CPU, spec=spec)
    assert [split.label(idx) for idx in range(4)] == [0, 2, 2, 2] and split.spec == spec
    (root / "test/dog").rmdir()
    with pytest.raises(UserError, match="dog has no folder, not even an empty one"):
        open_split("ImageFolder", root, False, CPU, spec=spec)


def test_hidden_files_and_other_files_are_skipped_and_counted(tmp_path):
    root = write_tree(tmp_path, BALANCED)
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/cat/._0.png", "cat/._1.png", "cat/.DS_Store", "dog/notes.txt"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"5 files are not images and were skipped \(4 hidden, 1 .txt\)"):
        split = open_split("ImageFolder", root, True, CPU)
    assert split.spec.class_names == ("cat", "dog") and len(split) == 9


@pytest.mark.parametrize("ending", ["gif", "webp", "tiff", "jp2", "avif", "PNG"])
def test_every_format_that_pillow_reads_is_read(tmp_path, ending):
    root = write_tree(tmp_path, BALANCED)
    image = Image.open(root / "train/cat/0.png")
    image.save(root / f"train/cat/9.{ending}")
    split = open_split("ImageFolder", root, True, CPU)
    assert len(split) == 10 and split.images[5].shape == (3, 12, 10)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_other_names_of_the_test_folder(tmp_path, name):
    root = write_tree(tmp_path, {"train": BALANCED["train"], name: BALANCED["test"]})
    assert len(open_split("ImageFolder", root, False, CPU)) == 5


def test_tiny_imagenets_own_layout(tmp_path):
    """train/<class>/images/*, val/images/* with a file of their classes, and test images without labels."""
    root = write_tree(tmp_path, {"train/n01": {"images": 3}, "train/n02": {"images": 2}})
    write_tree(root, {"val": {"images": 3}, "test": {"images": 2}})
    lines = [f"{i}.png\t{klass}\t0\t0\t9\t9\n" for i, klass in enumerate(("n02", "n01", "n02"))]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    train, test = (open_split("ImageFolder", root, part, CPU) for part in (True, False))
    assert train.spec.class_names == test.spec.class_names == ("n01", "n02")
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and test.labels.tolist() == [0, 1, 1]


def test_images_outside_class_folders_get_a_line_that_says_how_to_sort_them(tmp_path):
    write_tree(tmp_path, {".": {"ILSVRC2012_img_val": 3}})
    with pytest.raises(UserError, match=r"holds 3 images and no class folders: move each image into a folder named by"):
        open_split("ImageNet", tmp_path, False, CPU)


def test_a_test_tree_must_have_the_training_trees_classes(tmp_path):
    root = write_tree(tmp_path, {"train": {"cat": 2, "dog": 2}, "test": {"dog": 2}})
    spec = open_split("ImageFolder", root, True, CPU).spec
    with pytest.raises(UserError, match=r"classes are not those of training: cat has no folder"):
        open_split("ImageFolder", root, False, CPU, spec=spec)


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


def test_a_single_training_image_is_read_without_augmentation(tmp_path, monkeypatch):
    """What asks for it, votes on training images, say, must not depend on who drew what before, nor move the draws."""
    write_tree(tmp_path, {"ILSVRC2012_img_train": {"n1": 2, "n2": 1}}, size=(300, 280), extension="jpg")
    (tmp_path / "ILSVRC2012_img_val").symlink_to(tmp_path / "ILSVRC2012_img_train")
    monkeypatch.setitem(SPECS, "ImageNet", replace(SPECS["ImageNet"], num_classes=2))
    train, test = (open_split("ImageNet", tmp_path, part, CPU) for part in (True, False))
    before = torch.get_rng_state()
    assert all(torch.equal(train[idx][0], test[idx][0]) and train[idx][1] == test[idx][1] for idx in range(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_imagenet_without_its_folders_says_so(tmp_path):
    with pytest.raises(UserError, match="ILSVRC2012_img_val"):
        open_split("ImageNet", tmp_path, False, CPU)


def streamed(root, counts, workers=0):
    """A stream of the random images in root/x."""
    plain = v2.PILToTensor()
    tree = ImageTree(write_tree(root, {"x": counts}) / "x", loader=load_rgb, transform=plain)
    return StreamedSplit(DataSpec("toy", (3, 12, 10), len(counts), (0.5,) * 3, (0.5,) * 3), tree, plain, CPU, workers)


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
            _read_image(str(tmp_path / "bomb.png"))


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
        _read_image(str(tmp_path / "deep.png"))


def test_a_16_bit_tiff_is_refused(tmp_path):
    Image.fromarray(np.full((4, 3), 60_000, dtype=np.uint16)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep.tif' has more than 8 bits"):
        _read_image(str(tmp_path / "deep.tif"))


@pytest.mark.parametrize("largest", [b"65535", b"1023"])
@pytest.mark.parametrize("kind", [b"P2", b"P3", b"P5", b"P6"])
def test_a_deep_ppm_is_refused(tmp_path, kind, largest):
    """As text or as bytes, grey or in colour."""
    channels = 3 if kind in (b"P3", b"P6") else 1
    pixels = b"7 " * channels if kind in (b"P2", b"P3") else b"\0\7" * channels
    (tmp_path / "deep.ppm").write_bytes(kind + b"\n1 1\n" + largest + b"\n" + pixels)
    with pytest.raises(UserError, match=r"deep.ppm' has more than 8 bits"):
        _read_image(str(tmp_path / "deep.ppm"))


def test_a_ppm_of_fewer_levels_is_read(tmp_path):
    (tmp_path / "few.ppm").write_bytes(b"P6\n1 1\n51\n" + bytes([51, 0, 17]))
    assert load_rgb(str(tmp_path / "few.ppm")).getpixel((0, 0)) == (255, 0, 85)


def test_a_16_bit_sgi_file_is_refused(tmp_path):
    image = Image.new("RGB", (4, 3), (9, 8, 7))
    image.save(tmp_path / "image.sgi")
    assert load_rgb(str(tmp_path / "image.sgi")).getpixel((0, 0)) == (9, 8, 7)
    image.save(tmp_path / "image.sgi", bpc=2)
    with pytest.raises(UserError, match=r"image.sgi' has more than 8 bits"):
        _read_image(str(tmp_path / "image.sgi"))


def test_a_png_whose_second_chunk_of_pixels_is_broken_is_named(tmp_path):
    pixels = zlib.compress(bytes(4))
    write_png(tmp_path / "broken.png", 8, 2, (b"IDAT", pixels[:3]), (b"\0\0\0\0", pixels[3:]))
    with pytest.raises(UserError, match=r"broken.png' cannot be read as an image") as error:
        _read_image(str(tmp_path / "broken.png"))
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
    assert _read_image(str(tmp_path / "turned.jpg")).shape == (3, 4, 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_odd_images_become_rgb_without_a_warning(tmp_path, mode):
    path = tmp_path / ("odd.tif" if mode == "CMYK" else "odd.png")
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    Image.new(mode, (4, 3)).save(path, **options)
    assert _read_image(str(path)).shape == (3, 4, 3)


def test_a_picture_that_another_program_would_draw_is_not_opened(tmp_path):
    """Pillow hands EPS, a program, to Ghostscript, whatever the file is called."""
    path = tmp_path / "x.png"
    Image.new("L", (4, 4)).save(path, format="EPS")
    with pytest.raises(UserError, match=r"x.png' cannot be read as an image: cannot identify image file"):
        load_rgb(str(path))
