"""SmoothMix's attack: images that the smoothed heads are less sure of (Jeong et al., NeurIPS 2021)."""

from torch import Tensor

from spacte.model.ascent import pgd, project


def attack(
    classifier,
    images: Tensor,
    labels: Tensor,
    noises: Tensor,
    steps: int,
    mix_step: int,
    alpha: float,
    maxnorm_s: float | None,
    maxnorm: float | None,
) -> tuple[Tensor, Tensor]:
    """Climb the smoothed heads' loss from `images`; returns (clean, adversary), both [B, C, H, W] in [0, 1].

    The loss is J(x) = sum_i mean_h -log mean_j softmax(z_h(x_i + noise_j))[y_i]; each of `steps` steps goes `alpha` in
    L2 along its gradient, then into the ball of radius `maxnorm` around the image and into [0, 1]. The clean side is
    where the climb stands before step number `mix_step` (from 0), pulled into the ball of radius `maxnorm_s`. A norm
    of None bounds nothing.

    classifier: [N, C, H, W] -> [L, N, K], run in eval mode and left as it was, its parameters without gradient;
    images [B, C, H, W], labels [B], noises [m, B, C, H, W]. Source: arXiv 2111.09277, algorithm 1.
    """
    path = list(pgd(classifier, images, labels, lambda: noises, steps, alpha, maxnorm))
    return project(images, path[mix_step], maxnorm_s).clamp(0, 1), path[-1]
