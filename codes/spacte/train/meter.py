"""The means of a loss's parts over an epoch, gathered without waiting for the device."""

import numpy as np
import torch
from torch import Tensor

from spacte.distributed import all_reduce_mean, get_world_size
from spacte.utils import RunError, UserError, listed


class LossMeter:
    """Means of the loss's parts over an epoch; the values stay on the device until `flush`."""

    def __init__(self, epoch: int):
        self.epoch, self.steps, self.images = epoch, 0, 0
        self.pending: list[Tensor] = []
        self.counts: list[int] = []
        self.sums = np.zeros(())  # of the parts, once there are some
        self.names: list[str] = []

    def add(self, parts: dict[str, Tensor], images: int) -> None:
        """Note one step's parts, scalars by name, weighted by its number of images."""
        if self.names not in ([], list(parts)):
            raise UserError(f"the loss has the parts {listed(parts)} in one step, and {listed(self.names)} in another")
        self.names = list(parts)
        self.pending.append(torch.stack([part.detach().float() for part in parts.values()]))
        self.counts.append(images)

    def flush(self) -> None:
        """Fetch what is pending. Raises RunError with the epoch, the step and every part where one is not finite."""
        if not self.pending:
            return
        values = torch.stack(self.pending).double().cpu()  # [steps, parts]
        for step, row in enumerate(values, start=self.steps + 1):
            if not torch.isfinite(row).all():
                parts = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, row.tolist(), strict=True))
                raise RunError(f"the loss is not finite in epoch {self.epoch}, step {step}: {parts}")
        self.sums = self.sums + np.array(self.counts, dtype=float) @ values.numpy()
        self.steps += len(self.counts)
        self.images += sum(self.counts)
        self.pending, self.counts = [], []

    def join_processes(self) -> None:
        """Let the sums be those of all processes."""
        means = all_reduce_mean(torch.tensor([*self.sums, self.images], dtype=torch.float64))
        *sums, images = (means * get_world_size()).tolist()
        self.sums, self.images = np.array(sums), round(images)

    def means(self) -> dict[str, float]:
        """The mean of each part over the images flushed so far."""
        return dict(zip(self.names, (self.sums / self.images).tolist(), strict=True))
