"""SmoothMix's attack: images that the smoothed heads are less sure of (Jeong et al., NeurIPS 2021)."""

import contextlib

import torch
from torch import Tensor, nn

from spacte.teaching import noisy_logits


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
    clean = point = images
    with _frozen(classifier):
        for step in range(steps):
            if step == mix_step:
                clean = point
            step_to = point + alpha * _direction(classifier, point, labels, noises)
            point = _project(images, step_to, maxnorm).clamp(0, 1)
    return _project(images, clean, maxnorm_s).clamp(0, 1), point


@contextlib.contextmanager
def _frozen(classifier):
    """In here a module is in eval mode and its parameters need no gradient: compiled code then computes none."""
    if not isinstance(classifier, nn.Module):
        yield
        return
    training = classifier.training
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    try:
        classifier.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        classifier.train(training)
        for parameter in parameters:
            parameter.requires_grad_()


def _direction(classifier, point: Tensor, labels: Tensor, noises: Tensor) -> Tensor:
    """The gradient of J at `point`, of L2 norm 1 an image."""
    point = point.detach().requires_grad_()
    probabilities = noisy_logits(classifier, point, noises).softmax(-1).mean(1)  # [L, B, K]
    of_label = probabilities.gather(-1, labels.expand(len(probabilities), -1).unsqueeze(-1))
    loss = -of_label.clamp(min=1e-20).log().sum() / len(probabilities)
    (gradient,) = torch.autograd.grad(loss, point)
    return gradient / (_norms(gradient) + 1e-8)


def _project(centre: Tensor, point: Tensor, radius: float | None) -> Tensor:
    """The nearest point of the L2 ball around each image's centre."""
    if radius is None:
        return point
    offset = point - centre
    return centre + offset * (radius / _norms(offset).clamp(min=1e-12)).clamp(max=1)


def _norms(images: Tensor) -> Tensor:
    return torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
