"""Image files sorted by class: which files of a folder are images, of which class, and how one is read."""

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from spacte.utils import UserError, listed

Image.init()
# what Pillow reads by itself: not formats of vectors, films or arrays, for which it needs another program
_NOT_PIXELS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
_FORMATS = sorted({*Image.OPEN} - _NOT_PIXELS)
_ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in _FORMATS}
_COMMON = ".png, .jpg, .webp, .bmp, .gif, .tif, ..."
_ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's: a line for each image, its name and its class first


class ImageTree(datasets.ImageFolder):
    """The images of a folder `<class>/*`, or of Tiny-ImageNet's `val`, whose classes stand in a file.

    Classes may be empty where `empty` is true: those of a test set.

    Hidden files and folders (.ipynb_checkpoints, ._x.png, __MACOSX, ...) and files that are no images are skipped, and
    counted in one warning. Raises UserError if there is no class, or that names the classes without an image.
    """

    def __init__(self, folder: Path, empty: bool = False, **options: Any):
        self.skipped: Counter[str] = Counter()
        try:
            super().__init__(folder, is_valid_file=self._is_image, allow_empty=True, **options)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"no images in '{folder}', below --data_dir: expected one folder per class with image files in it"
            ) from error
        filled = set(self.targets)
        without = [f"'{name}'" for label, name in enumerate(self.classes) if label not in filled]
        if without and not (empty and filled):
            folders = "folder" if len(without) == 1 else "folders"
            raise UserError(
                f"no images in the class {folders} {listed(without)} of '{folder}': images end in {_COMMON}"
            )
        if self.skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common(5))
            warnings.warn(
                f"'{folder}': {self.skipped.total()} files are not images and were skipped ({kinds})", stacklevel=2
            )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The names of the class folders and their labels, in alphabetical order."""
        folder = Path(directory)
        self._annotated = _annotations(folder)
        if self._annotated:
            names = sorted(set(self._annotated.values()))
        else:
            entries = sorted(folder.iterdir())
            names = [entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name)]
            for entry in entries:
                if entry.is_dir() and _is_hidden(entry.name):
                    self.skipped["hidden"] += sum(1 for path in entry.rglob("*") if path.is_file())
        if not names:
            flat = sum(1 for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
            if flat:
                raise UserError(
                    f"'{folder}' holds {flat} images and no class folders: move each image into a folder named by its "
                    "class (ImageNet's devkit lists those of its validation images)"
                )
            raise FileNotFoundError(folder)
        return names, {name: label for label, name in enumerate(names)}

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], **options: Any) -> list[tuple[str, int]]:
        """(path, label) of each image, by class and name."""
        if not self._annotated:
            return datasets.ImageFolder.make_dataset(directory, class_to_idx, **options)
        files = [(str(Path(directory, "images", name)), class_to_idx[klass]) for name, klass in self._annotated.items()]
        return sorted(files, key=lambda file: (file[1], file[0]))

    def _is_image(self, path: str) -> bool:
        if any(map(_is_hidden, os.path.relpath(path, self.root).split(os.sep))):
            self.skipped["hidden"] += 1
            return False
        ending = os.path.splitext(path)[1].lower()
        if ending not in _ENDINGS:
            self.skipped[ending or "without ending"] += 1
            return False
        return True


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _annotations(folder: Path) -> dict[str, str]:
    """The class of each image that Tiny-ImageNet's file in the folder names; none without it."""
    if not (folder / _ANNOTATIONS).is_file():
        return {}
    lines = (folder / _ANNOTATIONS).read_text(errors="replace").splitlines()
    return {name: klass for name, klass, *_ in (line.split("\t") for line in lines if line.count("\t"))}


def folder_of_test_split(data_dir: Path) -> Path:
    """The test split's folder: `test`, or else `val` or `validation`. Tiny-ImageNet's test images have no labels."""
    if (data_dir / "val" / _ANNOTATIONS).is_file():
        return data_dir / "val"
    names = [name for name in ("test", "val", "validation") if (data_dir / name).is_dir()]
    return data_dir / (names or ["test"])[0]


def read_tree(folder: Path, empty: bool = False) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """All images of a `<class>/*` tree as [n, C, H, W] uint8, one channel if every image is greyscale, otherwise three.

    With `empty` a class may have none. Raises UserError that names the file if one cannot be read, has more than
    8 bits or another size.
    """
    tree = ImageTree(folder, empty)
    arrays = []
    for path, _ in tree.samples:
        arrays.append(_read_image(path))
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            height, width = arrays[-1].shape[:2]
            raise UserError(
                f"'{path}' is {height}x{width} pixels, '{tree.samples[0][0]}' is {arrays[0].shape[0]}x"
                f"{arrays[0].shape[1]}: an ImageFolder's images must have one size"
            )
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.stack([array] * 3, axis=-1) for array in arrays]
        images = np.stack(arrays).transpose(0, 3, 1, 2)
    else:
        images = np.stack(arrays)[:, None]
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(tree.targets), tuple(tree.classes)


def _read_image(path: str) -> np.ndarray:
    """[H, W] for a greyscale image, [H, W, 3] for any other. Raises UserError as `_open_image` does."""
    image = _open_image(path)
    return np.asarray(image.convert("L") if image.mode in ("1", "L") else image.convert("RGB"))


def load_rgb(path: str) -> Image.Image:
    """torchvision's loader with `_open_image`'s errors."""
    return _open_image(path).convert("RGB")


def _open_image(path: str) -> Image.Image:
    """The decoded image, as it is stored: EXIF rotation is not applied and transparency will be dropped.

    Raises UserError that names the file if it cannot be decoded, is too large, or has more than 8 bits per channel (not
    told of JPEG 2000 and AVIF in colour).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning an image would flood the terminal
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:  # whatever the ending: a .png may hold EPS
                deep = _is_deep(image, path)
                image.load()
                image.info.pop("transparency", None)  # convert() would warn of it
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsing meets
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{path}' cannot be read as an image: {reason}") from error
    if deep:
        raise UserError(f"'{path}' has more than 8 bits per channel: convert it to 8 bits")
    return image


def _is_deep(image: Image.Image, path: str) -> bool:
    """Whether more than 8 bits per channel are stored; Pillow reads many such images as 8 bits without a word."""
    if image.mode.startswith(("I", "F")):
        return True
    if image.format in ("PNG", "SGI"):
        with open(path, "rb") as file:
            head = file.read(25)
        return head[24] > 8 if image.format == "PNG" else head[3] > 1  # IHDR's bits, SGI's bytes per channel
    if image.format == "TIFF":
        return max(getattr(image, "tag_v2", {}).get(258, (1,))) > 8  # BitsPerSample
    if image.format == "PPM":  # its decoder is told the largest value, unless that is 255
        return any(isinstance(tile[3], tuple) and tile[3][-1] > 255 for tile in getattr(image, "tile", ()))
    return False
