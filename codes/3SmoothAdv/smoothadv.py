"""SmoothAdv's attack: PGD through the noise against the smoothed heads (Salman et al., NeurIPS 2019)."""

from torch import Tensor

from spacte.model.ascent import ascend, project, smoothed_loss
from spacte.model.noisy import noisy_logits
from spacte.train.teaching import smoothed_cross_entropy


def attack(classifier, images: Tensor, labels: Tensor, noises: Tensor, steps: int, max_norm: float) -> Tensor:
    """Images [B, C, H, W] in [0, 1] within L2 distance `max_norm` of `images` that the smoothed heads are less sure of.

    Each of `steps` steps goes 2 max_norm / steps along the gradient of J, then into [0, 1], then into the ball. J is
    sum_i mean_h -log mean_j softmax(z_h(x_i + noise_j))[y_i], for a single noise vector the plain cross-entropy.

    classifier: [N, C, H, W] -> [L, N, K], run in eval mode and left as it was, its parameters without gradient;
    images [B, C, H, W], labels [B], noises [m, B, C, H, W]. Source: arXiv 1906.04584, section 2.2.
    """

    def loss(point: Tensor) -> Tensor:
        """J at images [B, C, H, W], a scalar."""
        logits = noisy_logits(classifier, point, noises)  # [L, m, B, K]
        if len(noises) == 1:
            return smoothed_cross_entropy(logits, labels).mean(0).sum()
        return smoothed_loss(logits, labels)

    def constrain(point: Tensor) -> Tensor:
        return project(images, point.clamp(0, 1), max_norm)

    *_, adversary = ascend(classifier, images, loss, steps, 2 * max_norm / steps, constrain)
    return adversary
