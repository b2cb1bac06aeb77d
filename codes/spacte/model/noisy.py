"""Noisy copies of images, and a classifier's logits on them."""

from collections.abc import Callable

import torch
from torch import Tensor


def with_fixed_noise(images: Tensor, noise_sd: float) -> Tensor:
    """The images with Gaussian noise, always the same."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return images + noise_sd * noise.to(images.device)


def noisy_logits(classifier: Callable[[Tensor], Tensor], images: Tensor, noises: Tensor) -> Tensor:
    """Every head's logits for every noise vector, in one forward pass and in float32.

    classifier: [N, C, H, W] -> [L, N, K]; images [B, C, H, W] and noises [m, B, C, H, W] -> [L, m, B, K].
    """
    inputs = (images + noises).flatten(0, 1)  # [m * B, C, H, W]
    return classifier(inputs).float().unflatten(1, noises.shape[:2])
