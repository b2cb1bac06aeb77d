"""What a classifier has to know of a data set; those whose name says it. Needs no torch: logs are read with it."""

import math
from dataclasses import dataclass
from typing import Any

from spacte.utils import UserError


@dataclass(frozen=True)
class DataSpec:
    """What a classifier has to know of a data set.

    `shape` is (channels, height, width); `mean` and `std` normalise each channel; a pixel is an integer over `levels`.
    `class_names` are the folders of an image tree, in the order of the labels; empty where the set's name says enough.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    levels: int = 255
    class_names: tuple[str, ...] = ()

    @classmethod
    def from_file(cls, fields: dict[str, Any]) -> "DataSpec":
        """The spec whose fields a file holds. Raises ValueError if it is none."""
        try:
            spec = cls(**fields)
            sizes = (*spec.shape, spec.num_classes, spec.levels)
            figures = (*spec.mean, *spec.std)
            lists = (spec.shape, spec.mean, spec.std, spec.class_names)
            legal = all(isinstance(one, tuple | list) for one in lists)
            legal = legal and len(spec.shape) == 3 and len(spec.mean) == len(spec.std) == spec.shape[0]
            legal = legal and all(type(size) is int and 0 < size < 10**7 for size in sizes)
            legal = legal and all(isinstance(one, int | float) and abs(one) < math.inf for one in figures)
            legal = legal and all(type(text) is str for text in (spec.name, *spec.class_names))
            legal = legal and min(spec.std) > 0
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError("no data set") from error
        if not legal:
            raise ValueError("no data set")
        return spec


SPECS = {
    spec.name: spec
    for spec in (
        DataSpec("digits", (1, 8, 8), 10, (0.3054,), (0.3761,), levels=16),
        DataSpec("CIFAR10", (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        DataSpec("CIFAR100", (3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        DataSpec("SVHN", (3, 32, 32), 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        DataSpec("MNIST", (1, 28, 28), 10, (0.1307,), (0.3081,)),
        DataSpec("FashionMNIST", (1, 28, 28), 10, (0.2860,), (0.3530,)),
        DataSpec("ImageNet", (3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
}
DATASETS = (*SPECS, "ImageFolder")


def data_spec(name: str) -> DataSpec:
    """The spec of a data set whose name fixes it.

    Raises UserError for an unknown name, and for ImageFolder, whose files have to be read first.
    """
    if name in SPECS:
        return SPECS[name]
    if name == "ImageFolder":
        raise UserError("ImageFolder's image size and classes are read from its files: give a DataSpec, not the name")
    raise UserError(f"unknown data set '{name}': choose from {', '.join(DATASETS)}")


def size_text(shape: tuple[int, ...]) -> str:
    """How an image's (channels, height, width), or another shape, reads in a message."""
    if len(shape) != 3:
        return f"of shape {list(shape)}"
    channels, height, width = shape
    return f"{height}x{width} pixels in {channels} channel{'s' * (channels > 1)}"
