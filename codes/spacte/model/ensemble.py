"""How heads are combined, for certify, predict, attack and the accuracies of training: the sum of their logits."""

import torch
from torch import Tensor, nn


def ensemble_logits(logits: Tensor) -> Tensor:
    """The ensemble's logits, the sum over heads: [L, ..., K] -> [..., K]. Source: arXiv 2211.10882, section 3."""
    return logits.sum(0)


def voters(logits: Tensor) -> Tensor:
    """Who votes: each head and, in the last row, the ensemble: [L, N, K] -> [V, N, K] with V = L + 1.

    One head ([1, N, K], or [N, K]) is its own ensemble: V = 1.
    """
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    return torch.cat([logits, ensemble_logits(logits).unsqueeze(0)]) if len(logits) > 1 else logits


class NetworkEnsemble(nn.Module):
    """All heads of several networks, side by side: images [N, C, H, W] -> logits [L1 + L2 + ..., N, K].

    Their sum is the networks' summed logits: the DNN ensemble of Horvath et al. (ICLR 2022).
    """

    def __init__(self, networks: list[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head of every network."""
        return torch.cat([network(images) for network in self.networks])
