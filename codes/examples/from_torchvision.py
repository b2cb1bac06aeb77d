"""One of torchvision's classifiers with weights from a local file, as --classifier.

python codes/certify_mhead.py --classifier codes/examples/from_torchvision.py:build \
    --classifier_args arch=wide_resnet50_2 weights=wide_resnet50_2-9ba9bcbe.pth \
    --dataset ImageNet --data_dir imagenet --noise_sd 0.25 --skip 100
"""

import torch
from torch import nn
from torchvision.models import get_model

from spacte.model.normalisation import Normalize

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def build(arch: str, weights: str, num_classes: int = 1000) -> nn.Module:
    """The network `arch` with a file's state dict, behind the normalisation of torchvision's training."""
    network = get_model(arch, weights=None, num_classes=num_classes)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return nn.Sequential(Normalize(*IMAGENET), network)
