"""ACR-weakness's attack: noise of its own norm that fools the heads (Sun et al., ICML 2025)."""

import torch
from torch import Tensor

from spacte.model.ascent import ascend, l2_norms
from spacte.model.ensemble import ensemble_logits
from spacte.model.noisy import noisy_logits
from spacte.train.teaching import smoothed_cross_entropy


def attack(classifier, images: Tensor, labels: Tensor, noises: Tensor, steps: int, step_size: float) -> Tensor:
    """Noises [m, B, C, H, W] of the same norms, moved until the ensemble names another class than the label.

    Each noise goes at most `steps` steps of length `step_size` along the gradient of its copy's mean cross-entropy over
    the heads, after each of which it is scaled back to the norm that it was drawn with. The first point that the
    ensemble gets wrong is kept, so a drawn noise that already fools it stays as it is; if there is none, the last point
    is kept. Nothing is clipped.

    classifier: [N, C, H, W] -> [L, N, K], run in eval mode and left as it was, its parameters without gradient;
    images [B, C, H, W], labels [B]. Source: arXiv 2410.06895.
    """
    norms, wrong = l2_norms(noises), []

    def loss(point: Tensor) -> Tensor:
        """The sum over images and noises [m, B, C, H, W], a scalar; notes which noises fool the ensemble."""
        logits = noisy_logits(classifier, images, point)  # [L, m, B, K]
        wrong.append(ensemble_logits(logits.detach()).argmax(-1) != labels)  # [m, B]
        return smoothed_cross_entropy(logits, labels).mean(0).sum() * len(noises)

    def constrain(point: Tensor) -> Tensor:
        return point * norms / (l2_norms(point) + 1e-8)

    *tested, kept = ascend(classifier, noises, loss, steps, step_size, constrain)
    for point, is_wrong in zip(reversed(tested), reversed(wrong), strict=True):
        kept = torch.where(is_wrong[..., None, None, None], point, kept)
    return kept
