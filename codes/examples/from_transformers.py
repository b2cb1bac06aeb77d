"""An image classifier of Hugging Face transformers from a local folder, as --classifier.

python codes/certify_mhead.py --classifier codes/examples/from_transformers.py:build \
    --classifier_args folder=vit-base-patch16-224 --dataset ImageNet --data_dir imagenet --noise_sd 0.25 --skip 100

The folder is what save_pretrained or a download leaves: config.json, the weights, preprocessor_config.json.
"""

import json
from pathlib import Path

from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize
from transformers import AutoModelForImageClassification

from spacte.model.normalisation import Normalize


class HuggingFace(nn.Module):
    """Images [N, C, H, W] in [0, 1] -> logits [N, K]: resized and normalised as by its processor."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.normalise, self.network = Normalize(tuple(mean), tuple(std)), network

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K]."""
        size = getattr(self.network.config, "image_size", None)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            images = resize(images, [height, width], antialias=True)
        return self.network(pixel_values=self.normalise(images)).logits


def build(folder: str) -> nn.Module:
    """The model of the folder; nothing is downloaded."""
    network = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    processor = json.loads(Path(folder, "preprocessor_config.json").read_text())
    return HuggingFace(network, processor["image_mean"], processor["image_std"])
