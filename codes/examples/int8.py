"""A torchvision network quantised to int8 for the CPU, as --classifier: the certificate is the quantised network's.

python codes/certify_mhead.py --classifier codes/examples/int8.py:build \
    --classifier_args arch=resnet18 weights=my_weights.pth num_classes=10 dataset=CIFAR10 noise_sd=0.25 \
    --dataset CIFAR10 --noise_sd 0.25 --device cpu --skip 20

Scales are fixed beforehand, on noised training images. A scale that is taken from each batch would let an image's
answer depend on the others of its batch, and the check of the contract refuses that.
"""

import warnings

import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models import get_model

from spacte import open_split
from spacte.model.normalisation import normalisation


def build(
    arch: str,
    weights: str,
    num_classes: int,
    dataset: str,
    noise_sd: float,
    data_dir: str = "./data",
    images: int = 500,
) -> nn.Module:
    """The network behind the data set's normalisation, with scales from so many noised training images."""
    split = open_split(dataset, data_dir, train=True)
    network = get_model(arch, weights=None, num_classes=num_classes)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return quantised(nn.Sequential(normalisation("mean_std", split.spec), network), split, noise_sd, images)


def quantised(classifier: nn.Module, split, noise_sd: float, images: int) -> nn.Module:
    """The classifier in int8, with static scales from some noised images of the split, of all its classes."""
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces this interface's end
        some, _ = split.evenly_spaced(images)
        observed = prepare_fx(classifier.eval(), get_default_qconfig_mapping("x86"), (some[:1],))
        for image in some.split(1):
            observed(image + noise_sd * torch.randn(image.shape, generator=generator))
        return convert_fx(observed)
