"""Where the images of each data set come from. A new data set is an entry here, in SOURCES, and one in spec.SPECS."""

import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from spacte.data.image_files import ImageTree, folder_of_test_split, load_rgb, read_tree
from spacte.data.spec import DataSpec, data_spec
from spacte.data.splits import BatchedSplit, InMemory, StreamedSplit
from spacte.files import gone_on_failure, remove_leftovers, temporary_name
from spacte.utils import UserError, failure

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 images [n, C, H, W] or [n, H, W], integer labels [n]


@dataclass(frozen=True)
class Source:
    """A data set that fits in memory: how a split is read, and how training images are augmented.

    `read(data_dir, train)` returns uint8 images [n, H, W] or [n, C, H, W] and labels [n]; `crop` is the zero padding of
    a random crop, `flip` mirrors at random.
    """

    read: Callable[[Path, bool], Arrays]
    crop: int = 0
    flip: bool = False


def _digits(data_dir: Path, train: bool) -> Arrays:
    """scikit-learn's 8x8 digits, integers 0..16: a fixed stratified split of 1437 and 360 images."""
    from sklearn.datasets import load_digits  # takes a second, and no other data set needs it
    from sklearn.model_selection import train_test_split

    images, labels = load_digits().images.astype(np.uint8), load_digits().target
    halves = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    chosen = halves[0 if train else 1]
    return images[chosen], labels[chosen]


def _fixed_size(dataset: type, files: str, data_dir: Path, train: bool) -> Arrays:
    """A torchvision set: from <name>.npz in `data_dir` where that is, else from `files`, downloaded when missing."""
    arrays = data_dir / f"{dataset.__name__}.npz"
    return _saved_arrays(arrays, train) if arrays.exists() else _torchvision(dataset, files, data_dir, train)


def _saved_arrays(path: Path, train: bool) -> Arrays:
    """A split of an .npz file that holds images and labels of both; UserError that says what is wrong with it."""
    part = "train" if train else "test"
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in _SAVED if name not in file]
            arrays = [] if missing else [file[part], file[f"{part}_labels"]]
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"'{path}' is not a readable .npz file: it must hold {', '.join(_SAVED)}") from error
    if missing:
        raise UserError(f"'{path}' lacks {', '.join(missing)}: it must hold {', '.join(_SAVED)}")
    images, labels = arrays
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(f"'{path}': {part} must be uint8 [n, C, H, W] or [n, H, W], not {_describe(images)}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UserError(f"'{path}': {part}_labels must be {len(images)} integers, not {_describe(labels)}")
    return images, labels.astype(np.int64)


_SAVED = ("train", "train_labels", "test", "test_labels")


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


# what torchvision raises: "Dataset not found" where files are missing, or CIFAR's damaged, others of damaged files
_UNREADABLE = (RuntimeError, ValueError, TypeError, AssertionError, KeyError)


def _torchvision(dataset: type, files: str, data_dir: Path, train: bool) -> Arrays:
    """A torchvision set, downloaded when missing; `files` names what belongs in `data_dir`."""
    which = {"split": "train" if train else "test"} if dataset is datasets.SVHN else {"train": train}
    try:
        try:
            loaded = dataset(data_dir, download=False, **which)
        except _UNREADABLE as error:
            if not str(error).startswith("Dataset not found"):
                raise UserError(
                    f"{dataset.__name__} in '{data_dir}' is damaged ({failure(error)}): put {files} there again"
                ) from error
            loaded = _downloaded(dataset, data_dir, which)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        there = [data_dir / getattr(dataset, "base_folder", f"{dataset.__name__}/raw")]
        there += data_dir.glob("*_32x32.mat") if dataset is datasets.SVHN else []
        state = "is incomplete or damaged" if any(path.exists() for path in there) else "is not there"
        raise UserError(
            f"{dataset.__name__} in '{data_dir}' {state} and could not be downloaded ({reason}): put {files} there, "
            "or give the folder that holds them as --data_dir"
        ) from error
    labels = loaded.labels if dataset is datasets.SVHN else loaded.targets
    images = np.asarray(loaded.data)
    return (images.transpose(0, 3, 1, 2) if images.shape[-1] == 3 else images), np.asarray(labels)


def _downloaded(dataset: type, data_dir: Path, which: dict) -> Any:
    """The set downloaded to `data_dir`, which is left as it was when the download fails or is interrupted.

    The files are downloaded to a temporary folder inside `data_dir` and move up once the set was read from them.
    """
    with gone_on_failure(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(data_dir)
        own = data_dir / temporary_name("download")
        shutil.rmtree(own, ignore_errors=True)  # of a killed process with this one's number: in a container all have 1
        own.mkdir()
        try:
            # an archive that is there need not be fetched: CIFAR names its own, MNIST keeps four
            for archive in data_dir.glob(getattr(dataset, "filename", f"{dataset.__name__}/raw/*.gz")):
                _put(archive, own / archive.relative_to(data_dir), shutil.copy)
            loaded = dataset(own, download=True, **which)
            for file in [path for path in own.rglob("*") if path.is_file()]:
                _put(file, data_dir / file.relative_to(own), shutil.move)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return loaded


def _put(file: Path, target: Path, how: Callable) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    how(file, target)


SOURCES = {
    "digits": Source(_digits),
    "CIFAR10": Source(partial(_fixed_size, datasets.CIFAR10, "the folder 'cifar-10-batches-py'"), crop=4, flip=True),
    "CIFAR100": Source(partial(_fixed_size, datasets.CIFAR100, "the folder 'cifar-100-python'"), crop=4, flip=True),
    "SVHN": Source(partial(_fixed_size, datasets.SVHN, "'train_32x32.mat' and 'test_32x32.mat'"), crop=4),
    "MNIST": Source(partial(_fixed_size, datasets.MNIST, "'MNIST/raw' with the four idx-ubyte files")),
    "FashionMNIST": Source(
        partial(_fixed_size, datasets.FashionMNIST, "'FashionMNIST/raw' with the four idx-ubyte files")
    ),
}


def open_split(
    name: str, data_dir: Path | str, train: bool, device: torch.device | str = "cpu", workers: int = 0,
    spec: DataSpec | None = None,
) -> BatchedSplit:  # fmt: skip
    """The training or test split of a data set by name, on the device.

    Fixed-size sets are read from <data_dir>/<name>.npz where that is, and else downloaded to `data_dir` when missing.
    An ImageFolder's spec is measured on the split that is read: for the test split, give the training split's.
    Raises UserError for an unknown name, missing or unreadable files, an empty split, data outside [0, 1], images or
    classes that are not those of the `spec` given.
    """
    if train not in (True, False):
        raise UserError(f"train: '{train}' must be True, the training split, or False, the test split")
    split = _opened(name, Path(data_dir), train, torch.device(device), workers)
    return split if spec is None else split.with_spec(spec)


def _opened(name: str, data_dir: Path, train: bool, device: torch.device, workers: int) -> BatchedSplit:
    if name == "ImageFolder":
        images, labels, class_names = read_tree(
            data_dir / "train" if train else folder_of_test_split(data_dir), empty=not train
        )
        return InMemory(_measured_spec(images, class_names), images, labels, train, device, crop=4, flip=True)
    spec = data_spec(name)
    if name == "ImageNet":
        return StreamedSplit(spec, _imagenet(data_dir, train), _centre, device, workers)
    if name not in SOURCES:
        raise UserError(f"data set '{name}' has a spec, but no Source in spacte/data/sources.py that reads it")
    source = SOURCES[name]
    images, labels = (torch.as_tensor(array) for array in source.read(data_dir, train))
    images = images if images.dim() == 4 else images.unsqueeze(1)  # [n, H, W] -> [n, 1, H, W]
    return InMemory(spec, images, labels.long(), train, device, source.crop, source.flip)


def _measured_spec(images: Tensor, class_names: tuple[str, ...]) -> DataSpec:
    """Mean and deviation of each channel, exact, from the histogram of its 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = [torch.bincount(channel.flatten(), minlength=256) / channel.numel() for channel in images.unbind(1)]
    means = [float(share.double() @ values) for share in shares]
    deviations = [
        float(share.double() @ (values - mean) ** 2) ** 0.5 for share, mean in zip(shares, means, strict=True)
    ]
    deviations = [max(deviation, 1 / 255) for deviation in deviations]  # a constant channel stays finite
    return DataSpec(
        "ImageFolder", tuple(images.shape[1:]), len(class_names), tuple(means), tuple(deviations),
        class_names=class_names,
    )  # fmt: skip


_centre = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
_augmented = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def _imagenet(data_dir: Path, train: bool) -> datasets.ImageFolder:
    """ILSVRC 2012 with Cohen et al.'s transforms: random resized crop and flip, or resize to 256 and centre crop."""
    tree = ImageTree(
        data_dir / ("ILSVRC2012_img_train" if train else "ILSVRC2012_img_val"),
        transform=_augmented if train else _centre,
        loader=load_rgb,
    )
    num_classes = data_spec("ImageNet").num_classes
    if len(tree.classes) != num_classes:
        raise UserError(f"'{tree.root}' holds {len(tree.classes)} class folders, ImageNet has {num_classes}")
    return tree
