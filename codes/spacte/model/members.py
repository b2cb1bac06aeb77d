"""The members of an ensemble that can be computed apart, and the ensemble of several networks."""

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from spacte.model.ensemble import ensemble_logits
from spacte.model.passes import FixedPasses


@runtime_checkable
class Members(Protocol):
    """A classifier whose members' logits can be computed apart: a network's heads, or the networks of an ensemble."""

    @property
    def members(self) -> int:
        """How many there are."""

    def features(self, images: Tensor) -> Tensor:
        """What all members read: images [N, C, H, W] -> [N, ...]."""

    def member_logits(self, features: Tensor, members: range, few: bool = False) -> Tensor:
        """The logits of some members: features [N, ...] -> [len(members), N, K].

        `few`: of the features of a few images of a batch, in smaller passes.
        """


class NetworkEnsemble(nn.Module):
    """All heads of several networks, side by side: images [N, C, H, W] -> logits [L1 + L2 + ..., N, K].

    Their sum is the networks' summed logits: the DNN ensemble of Horvath et al. (ICLR 2022). A network of more heads
    weighs more in it. Its Members are the networks, each with the sum of its own heads.
    """

    def __init__(self, networks: Sequence[FixedPasses]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head of every network."""
        return torch.cat([network(images) for network in self.networks])

    @property
    def members(self) -> int:
        """See Members."""
        return len(self.networks)

    def features(self, images: Tensor) -> Tensor:
        """See Members: the networks share no more than the images."""
        return images

    def member_logits(self, features: Tensor, members: range, few: bool = False) -> Tensor:
        """See Members."""
        networks = [cast(FixedPasses, self.networks[member]) for member in members]
        logits = [network.logits_of_few(features) if few else network(features) for network in networks]
        return torch.stack([ensemble_logits(one) for one in logits])
