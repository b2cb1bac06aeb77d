"""CAT-RS's attack: noise under which the heads leave the soft votes (Jeong et al., AAAI 2023)."""

import torch
from torch import Tensor

from spacte.model.ascent import ascend, project
from spacte.model.noisy import noisy_logits
from spacte.train.teaching import divergences


def attack(classifier, images: Tensor, noises: Tensor, soft_votes: Tensor, steps: int, max_norm: float) -> Tensor:
    """Noises [m, B, C, H, W], each moved so that the heads' predictions diverge from the soft votes.

    J = sum_i mean_h mean_j KL(soft_votes_i || softmax z_h(x_i + noise_ji)). Each of `steps` steps goes 2 max_norm /
    steps in L2 along its gradient, for each noise by itself, then into the ball of radius max_norm around the drawn
    noise, and then gets the drawn noise's mean and, roughly, its scale: as in the authors' code, the centred noise is
    divided by the root mean square of the uncentred one and multiplied by the drawn noise's. This may take it out of
    the ball again.

    classifier: [N, C, H, W] -> [L, N, K], run in eval mode and left as it was, its parameters without gradient;
    images [B, C, H, W], soft_votes [B, K] in rows that sum to 1. Source: arXiv 2212.09000.
    """
    mean, scale = _mean(noises), _root_mean_square(noises)

    def loss(point: Tensor) -> Tensor:
        return divergences(noisy_logits(classifier, images, point), soft_votes).mean((0, 1)).sum()

    def constrain(point: Tensor) -> Tensor:
        point = project(noises, point, max_norm)
        return mean + (point - _mean(point)) / _root_mean_square(point) * scale

    *_, adversarial_noises = ascend(classifier, noises, loss, steps, 2 * max_norm / steps, constrain)
    return adversarial_noises


def _mean(noises: Tensor) -> Tensor:
    return noises.mean((-3, -2, -1), keepdim=True)


def _root_mean_square(noises: Tensor) -> Tensor:
    return torch.sqrt(noises.square().mean((-3, -2, -1), keepdim=True))
