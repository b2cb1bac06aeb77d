"""The members of an ensemble that can be computed apart, and the ensemble of several networks."""

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from spacte.model.ensemble import ensemble_logits
from spacte.model.passes import FixedPasses


@runtime_checkable
class HasMembers(Protocol):
    """A classifier whose members' logits can be computed apart: a network's heads, or the networks of an ensemble."""

    @property
    def members(self) -> int:
        """How many there are."""

    def first_logits(self, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The first members' logits on images [N, C, H, W], [first, N, K], and features [N, ...] for the others."""

    def other_logits(self, features: Tensor, first: int) -> Tensor:
        """The other members' logits, from the features of a few images: [M - first, N, K], M = `members`."""


class NetworkEnsemble(nn.Module):
    """All heads of several networks, side by side: images [N, C, H, W] -> logits [L1 + L2 + ..., N, K].

    Their sum is the networks' summed logits: the DNN ensemble of Horvath et al. (ICLR 2022). A network of more heads
    weighs more in it. Its members are the networks, each with the sum of its own heads.
    """

    def __init__(self, networks: Sequence[FixedPasses]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head of every network."""
        return torch.cat([network(images) for network in self.networks])

    @property
    def members(self) -> int:
        """See HasMembers."""
        return len(self.networks)

    def first_logits(self, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """See HasMembers: the networks share no more than the images."""
        return torch.stack([ensemble_logits(network(images)) for network in self.networks[:first]]), images

    def other_logits(self, features: Tensor, first: int) -> Tensor:
        """See HasMembers."""
        others = [cast(FixedPasses, network) for network in self.networks[first:]]
        return torch.stack([ensemble_logits(network.logits_of_few(features)) for network in others])
