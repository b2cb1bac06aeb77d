"""Multi-head LeNet for MNIST, as the papers on smoothing use it: two convolutions, two linear layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from spacte.model.heads import MultiHeadNetwork


class LeNetMultiHead(MultiHeadNetwork):
    """The two convolutions are shared; a head is the two linear layers.

    A head's first layer is written as the convolution of 4x4 that it is on 4x4 features: the same sums over the same
    weights. Takes images of 28x28 pixels. Source: LeCun et al. (1998), with the widths of MACER (Zhai et al., ICLR
    2020) and its successors.
    """

    min_size = max_size = 28

    def __init__(self, num_heads: int, num_classes: int, in_channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Conv2d(50, 500, kernel_size=4), nn.ReLU()), nn.Linear(500, num_classes))
            for _ in range(num_heads)
        )
        self.initialise()

    def trunk(self, images: Tensor) -> Tensor:
        """[N, C, 28, 28] -> [N, 50, 4, 4]."""
        return F.max_pool2d(F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(images)), 2))), 2)
