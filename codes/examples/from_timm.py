"""A timm model as --classifier: its own input size and normalisation come after the noise.

python codes/certify_mhead.py --classifier codes/examples/from_timm.py:build \
    --classifier_args model=resnet18 weights=my_weights.pth num_classes=10 \
    --dataset CIFAR10 --noise_sd 0.25 --skip 20
"""

import timm
from torch import nn
from torchvision.transforms.v2 import Resize

from spacte.model.normalisation import Normalize


def build(model: str, weights: str = "", num_classes: int = 1000, resize: int = 0) -> nn.Module:
    """The model with the weights of a file, which timm loads; `resize` scales images to that many pixels first.

    Without a file the weights are random: nothing is downloaded.
    """
    network = timm.create_model(model, pretrained=False, num_classes=num_classes, checkpoint_path=weights)
    config = timm.data.resolve_data_config({}, model=network)
    front = [Resize((resize, resize), antialias=True)] if resize else []
    return nn.Sequential(*front, Normalize(config["mean"], config["std"]), network)
