"""One split of a data set as batches in [0, 1] on the device.

A split that fits in memory is one uint8 tensor on the device, augmented there a batch at a time; ImageNet streams
through torchvision's transforms and worker processes.
"""

import copy
import hashlib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from spacte.data.spec import DataSpec, size_text
from spacte.distributed import get_rank, get_world_size
from spacte.utils import UserError, listed


class Split(ABC):
    """One split of a data set: `split[idx]` is an image [C, H, W] in [0, 1] on the device, never augmented, and its
    label.
    """

    def __init__(self, spec: DataSpec, device: torch.device):
        self.spec, self.device = spec, device

    @abstractmethod
    def __len__(self) -> int:
        """How many images it has."""

    @abstractmethod
    def __getitem__(self, idx: int) -> tuple[Tensor, int]:
        """An image and its label."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that two splits share only if they hold the same images (a streamed one: file names) and labels."""

    def label(self, idx: int) -> int:
        """The label of an image, without reading the image where that can be."""
        return self[idx][1]

    def with_spec(self, spec: DataSpec) -> Self:
        """The same split, described by a classifier's spec. UserError if sizes or classes differ."""
        if spec.class_names != self.spec.class_names:
            missing, unknown = (
                [name for name in one if name not in other]
                for one, other in ((spec.class_names, self.spec.class_names), (self.spec.class_names, spec.class_names))
            )
            said = [f"training had no class {listed(unknown)}"] * bool(unknown)
            said += [f"{listed(missing)} has no folder, not even an empty one"] * bool(missing)
            raise UserError(
                f"the images' classes are not those of training: {', '.join(said) or 'their order differs'}"
            )
        if spec.num_classes != self.spec.num_classes:
            raise UserError(f"the images have {self.spec.num_classes} classes, the classifier has {spec.num_classes}")
        _check_size(spec, self.spec.shape)
        same = copy.copy(self)
        same.spec = spec
        return same

    def evenly_spaced(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` images [n, C, H, W], evenly spaced over the split (all, if there are fewer), and their labels [n];
        always the same ones.
        """
        indices = torch.linspace(0, len(self) - 1, min(count, len(self)), dtype=torch.float32).long().tolist()
        images, labels = zip(*(self[idx] for idx in indices), strict=True)
        return torch.stack(images), torch.tensor(labels)

    def _scaled(self, images: Tensor) -> Tensor:
        return images.float() / self.spec.levels


def _check_size(spec: DataSpec, shape: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(spec.shape):
        moved = "; put the channels first" if len(shape) == 3 and (shape[2], *shape[:2]) == tuple(spec.shape) else ""
        raise UserError(f"{spec.name}: images should be {size_text(spec.shape)}, these are {size_text(shape)}{moved}")


class BatchedSplit(Split):
    """A split that `batches` passes over, as training does."""

    def batches(
        self, batch_size: int, order: Generator | None = None, smallest: int = 1, weights: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Iterator:  # fmt: skip
        """Images [B, C, H, W], float32 in [0, 1] on the device, and labels [B]; a training split's are augmented.

        `order` shuffles or, where there are sampling `weights` [n], draws n images in proportion to them, with
        replacement. Of `targets` [n, ...] each batch's rows come third. A last batch of fewer than `smallest` images is
        left out. Of several processes each gets its own part of every batch, provided that their `order` generators and
        weights agree.
        """
        if order is None:
            indices = torch.arange(len(self))
        elif weights is None:
            indices = torch.randperm(len(self), generator=order)
        else:
            weights = torch.as_tensor(weights)
            if weights.shape != (len(self),) or not weights.isfinite().all() or weights.min() < 0 or weights.max() == 0:
                raise UserError(f"sampling weights must be {len(self)} finite numbers of at least 0, not all 0")
            indices = torch.multinomial(weights.double().cpu(), len(self), replacement=True, generator=order)
        chunks = indices.split(batch_size)[: self.num_batches(batch_size, smallest)]
        mine = [chunk for chunk in (chunk[get_rank() :: get_world_size()] for chunk in chunks) if len(chunk)]
        batches = self._load(mine)
        if targets is None:
            yield from batches
        else:
            for (images, labels), chosen in zip(batches, _together(mine, targets.device), strict=True):
                yield images, labels, targets[chosen].to(self.device)

    def keep_first_of_each_class(self, images: int) -> None:
        """Keep the first images / K of each of the K classes, in the split's order: the same ones in every run.

        Raises UserError if `images` is not a multiple of K or a class has too few.
        """
        labels = self._labels()
        per_class, rest = divmod(images, self.spec.num_classes)
        counts = labels.bincount(minlength=self.spec.num_classes)
        fewest = int(counts.min())
        if not fewest:
            raise UserError(f"--train_images {images}: class {int(counts.argmin())} has no image")
        if rest or not 1 <= per_class <= fewest:
            raise UserError(
                f"--train_images {images}: it must be a multiple of the {self.spec.num_classes} classes and at most "
                f"{fewest * self.spec.num_classes}, {fewest} of each"
            )
        first = [(labels == k).nonzero().flatten()[:per_class] for k in range(self.spec.num_classes)]
        self._keep(torch.cat(first).sort().values)

    def num_batches(self, batch_size: int, smallest: int = 1) -> int:
        """How many batches `batches` yields for the same arguments."""
        full, rest = divmod(len(self), batch_size)
        return full * (batch_size >= smallest) + (rest >= smallest)

    @abstractmethod
    def _load(self, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of these indices."""

    @abstractmethod
    def _labels(self) -> Tensor:
        """All labels, [n]."""

    @abstractmethod
    def _keep(self, indices: Tensor) -> None:
        """Keep these images alone, in their order."""


class InMemory(BatchedSplit):
    """A split held as one uint8 tensor on the device.

    `images` [n, C, H, W] holds integers from 0 to spec.levels, `labels` [n] integers below spec.num_classes: UserError
    otherwise, or if there are none. `crop` (pixels of zero padding) and `flip` augment a training split.
    """

    def __init__(
        self, spec: DataSpec, images: Tensor, labels: Tensor, train: bool = False,
        device: torch.device | None = None, crop: int = 0, flip: bool = False,
    ):  # fmt: skip
        super().__init__(spec, device or images.device)
        part = "training" if train else "test"
        if len(images) == 0:
            raise UserError(f"{spec.name}: the {part} split is empty")
        if images.dtype != torch.uint8 or int(images.max()) > spec.levels:
            raise UserError(
                f"{spec.name}: {part} images lie outside [0, 1]: pixels must be uint8 from 0 to {spec.levels}, "
                f"these are {str(images.dtype).removeprefix('torch.')} from {images.min()} to {images.max()}"
            )
        _check_size(spec, tuple(images.shape[1:]))
        if len(labels) != len(images):
            raise UserError(f"{spec.name}: {len(images)} {part} images have {len(labels)} labels")
        if int(labels.min()) < 0 or int(labels.max()) >= spec.num_classes:
            raise UserError(
                f"{spec.name}: labels must lie in 0..{spec.num_classes - 1}; these lie in {int(labels.min())}.."
                f"{int(labels.max())}"
            )
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self._labels_on_cpu = labels.cpu()  # a number from a GPU waits for all that it has still to do
        self.crop, self.flip = crop if train else 0, flip and train

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, idx: int) -> tuple[Tensor, int]:
        return self._scaled(self.images[idx]), self.label(idx)

    def label(self, idx: int) -> int:
        """See Split."""
        return int(self._labels_on_cpu[idx])

    def fingerprint(self) -> str:
        """See Split."""
        content = hashlib.sha256(self.images.cpu().numpy().tobytes())
        content.update(self.labels.cpu().numpy().tobytes())
        return content.hexdigest()

    def _labels(self) -> Tensor:
        return self._labels_on_cpu

    def _keep(self, indices: Tensor) -> None:
        self.images, self.labels = self.images[indices], self.labels[indices]
        self._labels_on_cpu = self._labels_on_cpu[indices]

    def _load(self, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in _together(chunks, self.device):
            images = self.images[chosen]
            if self.crop:
                images = random_crop(images, self.crop)
            if self.flip:
                images = random_flip(images)
            yield self._scaled(images), self.labels[chosen]


class StreamedSplit(BatchedSplit):
    """A split read from files by worker processes: ImageNet.

    `dataset` yields uint8 images [C, H, W] and labels, augmented for training; `plain` makes such an image, without
    augmentation, of what the dataset's loader reads.
    """

    def __init__(
        self, spec: DataSpec, dataset: ImageFolder, plain: Callable[[Any], Tensor], device: torch.device, workers: int
    ):
        super().__init__(spec, device)
        self.dataset, self.plain, self.workers = dataset, plain, workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[Tensor, int]:
        path, label = self.dataset.samples[idx]
        return self._scaled(self.plain(self.dataset.loader(path)).to(self.device)), label

    def label(self, idx: int) -> int:
        """See Split."""
        return self.dataset.targets[idx]

    def fingerprint(self) -> str:
        """A hash of file names and labels, not of pixels, though logs call it data_sha256 as any other."""
        names = (f"{Path(path).name} {label}" for path, label in self.dataset.samples)
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def _labels(self) -> Tensor:
        return torch.tensor(self.dataset.targets)

    def _keep(self, indices: Tensor) -> None:
        kept = [self.dataset.samples[idx] for idx in indices]
        self.dataset.samples = self.dataset.imgs = kept  # imgs: torchvision's second name, by which all would stay
        self.dataset.targets = [label for _, label in self.dataset.samples]

    def _load(self, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in _with_one_line_errors(loader):
            images = images.to(self.device, non_blocking=True)
            yield self._scaled(images), labels.to(self.device, non_blocking=True)


def _together(chunks: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """The chunks of indices on the device, copied all at once: a copy waits for what the device has still to do."""
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *chunks])
    return indices.to(device).split([len(chunk) for chunk in chunks])


def _with_one_line_errors(loader: DataLoader) -> Iterator:
    """The loader's batches; a worker's UserError, which arrives with its traceback as text, is one line again."""
    try:
        yield from loader
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # they would keep the workers alive
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.split("UserError: ", 1)[-1]) from None


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Each image [n, C, H, W] shifted by its own draw from -padding..padding in both directions, zeros outside."""
    n, _, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device)).unsqueeze(2)  # [n, H, 1]
    columns = (left + torch.arange(width, device=images.device)).unsqueeze(1)  # [n, 1, W]
    which = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2)


def random_flip(images: Tensor) -> Tensor:
    """Each image [n, C, H, W] mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)
