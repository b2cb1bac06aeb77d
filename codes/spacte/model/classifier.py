"""A classifier as it is trained and loaded: a normalisation layer, a network, the precision of their arithmetic."""

from typing import cast

from torch import Tensor, nn

from spacte.model.heads import MultiHeadNetwork
from spacte.precision import autocast


class Classifier(nn.Sequential):
    """`Classifier(normalise, network)`: images [N, C, H, W] in [0, 1] -> logits [L, N, K].

    With `precision` "bf16" it computes in torch.autocast; a copy does, too, by its own weights.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules)
        self.precision = "fp32"

    @property
    def network(self) -> MultiHeadNetwork:
        """The network behind the normalisation."""
        return cast(MultiHeadNetwork, self[1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every head."""
        if self.precision != "bf16":
            return super().forward(images)
        with autocast(images.device, self.precision):
            return super().forward(images)
