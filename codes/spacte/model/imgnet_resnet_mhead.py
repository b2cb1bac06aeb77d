"""Multi-head ResNets for ImageNet: R18 to R152."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from spacte.model.heads import MultiHeadNetwork, make_stage

STAGES = {
    "R18": (BasicBlock, (2, 2, 2, 2)),
    "R34": (BasicBlock, (3, 4, 6, 3)),
    "R50": (Bottleneck, (3, 4, 6, 3)),
    "R101": (Bottleneck, (3, 4, 23, 3)),
    "R152": (Bottleneck, (3, 8, 36, 3)),
}


class ImageNetResNetMultiHead(MultiHeadNetwork):
    """torchvision's ResNet with a shared stem and three shared stages; a head is the fourth stage and the linear layer.

    Takes any image of at least 32 x 32 pixels. Source: He et al. (2016); heads as in arXiv 2211.10882.
    """

    min_size = 32

    def __init__(self, arch: str, num_heads: int, num_classes: int, in_channels: int = 3):
        super().__init__()
        block, blocks = STAGES[arch]
        expansion = block.expansion
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = make_stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = make_stage(block, 64 * expansion, 128, blocks[1], stride=2)
        self.layer3 = make_stage(block, 128 * expansion, 256, blocks[2], stride=2)
        self.heads = nn.ModuleList(
            nn.Sequential(
                make_stage(block, 256 * expansion, 512, blocks[3], stride=2), nn.Linear(512 * expansion, num_classes)
            )
            for _ in range(num_heads)
        )
        self.initialise()

    def trunk(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 256 * expansion, H/16, W/16]."""
        stem = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), kernel_size=3, stride=2, padding=1)
        return self.layer3(self.layer2(self.layer1(stem)))
