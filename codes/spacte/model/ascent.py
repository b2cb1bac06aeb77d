"""Projected gradient ascent on a loss: what every attack here and in the defences' folders is."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from spacte.model.noisy import noisy_logits


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """J = sum_i mean_h -log max(mean_j softmax(z[h,j,i])[y_i], 1e-20): logits [L, m, B, K], labels [B] -> a scalar."""
    probabilities = logits.softmax(-1).mean(1)  # [L, B, K]
    of_label = probabilities.gather(-1, labels.expand(len(probabilities), -1).unsqueeze(-1))
    return -of_label.clamp(min=1e-20).log().sum() / len(probabilities)


def ascend(
    classifier: Callable[[Tensor], Tensor],
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    step_size: float,
    constrain: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Projected gradient ascent on `loss`: yields the points before the first and after each step, without gradient.

    A point [..., C, H, W] is images or noises, each of which goes `step_size` in L2 along its own gradient and then
    where `constrain` puts it; a gradient of 0 is no step. `loss(point)` is a scalar, evaluated once per step. A
    classifier that is a module is meanwhile in eval mode with its parameters held fixed, and left as it was.
    """
    point = start
    yield point
    for _ in range(steps):
        with eval_with_fixed_parameters(classifier):
            point = point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(point), point)
        point = constrain(point.detach() + step_size * gradient / (l2_norms(gradient) + 1e-8))
        yield point


def pgd(
    classifier: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    noises: Callable[[], Tensor],
    steps: int,
    step_size: float,
    max_norm: float | None = None,
) -> Iterator[Tensor]:
    """Climb the smoothed loss J from `images` [B, C, H, W]: yields the images before the first and after each step.

    A step goes `step_size` in L2 along the gradient of each image, then into the ball of radius `max_norm` around the
    image (None: no ball) and into [0, 1]. `noises()` returns the noise vectors [m, B, C, H, W] of a step: always the
    same ones or fresh ones. classifier: [N, C, H, W] -> [L, N, K]; a module is run in eval mode with its parameters
    held fixed, and left as it was. Source: Salman et al. (NeurIPS 2019), section 2.2; Jeong et al. (NeurIPS 2021).
    """

    def loss(point: Tensor) -> Tensor:
        return smoothed_loss(noisy_logits(classifier, point, noises()), labels)

    def constrain(point: Tensor) -> Tensor:
        return project(images, point, max_norm).clamp(0, 1)

    return ascend(classifier, images, loss, steps, step_size, constrain)


@contextlib.contextmanager
def eval_with_fixed_parameters(classifier: object) -> Iterator[None]:
    """Within it a module is in eval mode and its parameters need no gradient: compiled code then computes none."""
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


def project(centre: Tensor, point: Tensor, radius: float | None) -> Tensor:
    """The nearest point of the L2 ball around each image's centre; the point itself where the radius is None."""
    if radius is None:
        return point
    offset = point - centre
    return centre + offset * (radius / l2_norms(offset).clamp(min=1e-12)).clamp(max=1)


def l2_norms(images: Tensor) -> Tensor:
    """The L2 norm of each image or noise: [..., C, H, W] -> [..., 1, 1, 1]."""
    return torch.linalg.vector_norm(images, dim=(-3, -2, -1), keepdim=True)
