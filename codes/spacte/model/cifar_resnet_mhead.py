"""Multi-head ResNets for small images: 6n + 2 layers, widths 16, 32 and 64."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv3x3

from spacte.model.heads import MultiHeadNetwork, make_stage


class CifarResNetMultiHead(MultiHeadNetwork):
    """Stem and two stages are shared; a head is the third stage and the linear layer.

    Takes any image of at least 8 x 8 pixels. Source: He et al. (2016), section 4.2; heads as in arXiv 2211.10882.
    """

    min_size = 8

    def __init__(self, depth: int, num_heads: int, num_classes: int, in_channels: int = 3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = make_stage(BasicBlock, 16, 16, blocks, stride=1)
        self.layer2 = make_stage(BasicBlock, 16, 32, blocks, stride=2)
        self.heads = nn.ModuleList(
            nn.Sequential(make_stage(BasicBlock, 32, 64, blocks, stride=2), nn.Linear(64, num_classes))
            for _ in range(num_heads)
        )
        self.initialise()

    def trunk(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 32, H/2, W/2]."""
        return self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images)), inplace=True)))
