"""A user's own data as a split: anything that is indexed, whose items are an image and its label."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from spacte.data.spec import DataSpec, size_text
from spacte.data.splits import Split
from spacte.utils import FOREIGN_ERRORS, UserError, failure, listed


class UserSplit(Split):
    """A split over any torch Dataset of the user's, or anything that is indexed like one; never augmented.

    `dataset[idx]` is an image, uint8 from 0 to spec.levels or floating point, of the spec's shape as a tensor or an
    array, or a PIL image, and its label. Floating point must lie in [0, 1] unless `any_range`. Raises UserError if
    an item has no such image or label, and where an image differs when it is read again.
    """

    def __init__(self, spec: DataSpec, dataset: Any, device: torch.device, any_range: bool = False):
        super().__init__(spec, device)
        self.dataset, self.any_range = dataset, any_range
        self.range = math.inf, -math.inf  # of the values that were read
        self._read: dict[int, bytes] = {}  # the hashes of the items that were read
        if len(dataset) == 0:
            raise UserError(f"{spec.name}: the data are empty")
        for idx in 2 * [*range(min(8, len(dataset)))]:  # twice: items that change are refused now
            self[idx]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[Tensor, int]:
        image, label, _ = self._item(idx)
        return image.to(self.device), label

    def _item(self, idx: int) -> tuple[Tensor, int, bytes]:
        """An item as it is to be, and its bytes."""
        image, label = read_item(self.dataset, idx)
        if image.dtype == torch.uint8 and int(image.max()) > self.spec.levels:
            raise UserError(
                f"{self.spec.name}: image {idx} has pixels up to {int(image.max())}, and levels is {self.spec.levels}"
            )
        image = self._scaled(image) if image.dtype == torch.uint8 else image.float()
        low, high = float(image.min()), float(image.max())
        self.range = min(low, self.range[0]), max(high, self.range[1])
        if not math.isfinite(low) or not math.isfinite(high):
            raise UserError(f"{self.spec.name}: image {idx} has values that are not finite")
        if not self.any_range and not 0 <= low <= high <= 1:
            raise UserError(
                f"{self.spec.name}: image {idx} has values from {low:.3g} to {high:.3g}: they must lie in [0, 1]; "
                "normalisation belongs in the classifier, after the noise"
            )
        if tuple(image.shape) != tuple(self.spec.shape):
            there, here = size_text(tuple(self.spec.shape)), list(image.shape)
            there += f", {list(self.spec.shape)}" * (len(self.spec.shape) == 3)
            raise UserError(f"{self.spec.name}: images should be {there}, image {idx} is {here}")
        if not 0 <= label < self.spec.num_classes:
            raise UserError(
                f"{self.spec.name}: image {idx} has label {label}: it must lie in 0..{self.spec.num_classes - 1}"
            )
        content = image.cpu().numpy().tobytes() + f" {label}\n".encode()
        digest = hashlib.sha256(content).digest()
        if self._read.setdefault(idx, digest) != digest:
            raise UserError(
                f"{self.spec.name}: item {idx} differs each time it is read: switch the data's augmentation off"
            )
        return image, label, content

    def fingerprint(self) -> str:
        """See Split; every item is read."""
        content = hashlib.sha256()
        for idx in range(len(self)):
            content.update(self._item(idx)[2])
        return content.hexdigest()


def read_item(dataset: Any, idx: int) -> tuple[Tensor, int]:
    """An item of a user's data: its image, a tensor, an array or a PIL image, as a tensor; its label.

    Raises UserError with what an item must be where it is not that, or cannot be read.
    """
    try:
        item = dataset[idx]
    except FOREIGN_ERRORS as error:
        raise UserError(f"item {idx} of the data cannot be read: {failure(error)}") from error
    legal = f"item {idx} of the data must be an image and its label"
    if isinstance(item, Mapping):
        raise UserError(
            f"{legal}: it is a dict of {listed(list(item))}; give a Dataset that returns two of these values"
        )
    try:
        image, label = item
    except (TypeError, ValueError):
        raise UserError(f"{legal}: it is a {_describe(item)}") from None
    try:
        image = pil_to_tensor(image) if isinstance(image, Image.Image) else torch.as_tensor(image).detach()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{legal}: its image is a {_describe(image)}, not a tensor, an array or a picture") from None
    if not image.dim() or not image.numel() or image.is_complex():
        raise UserError(f"{legal}: its image is a {_describe(image)}, not real values of one dimension or more")
    try:
        number = float(label)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{legal}: its label is a {_describe(label)}, not an integer") from None
    if not number.is_integer():
        raise UserError(f"{legal}: its label {label} must be an integer")
    return image, int(number)


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {list(shape)}")
