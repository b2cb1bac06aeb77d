"""The smoothed classifier: votes over Gaussian noise, prediction, certified radius. Knows no data set, file or flag."""

import torch
from scipy.stats import binomtest
from torch import Generator, Tensor, nn

from spacte.bounds import lower_confidence_bound, radius_of

ABSTAIN = -1


class Smooth:
    """g(x) = the class that the heads' summed logits choose most often on x + N(0, sigma^2 I).

    `base_classifier` maps [N, C, H, W] to logits [L, N, K] (or [N, K], one head) and must treat each image of a batch
    on its own: a module is put into eval mode. Source: Cohen et al. (ICML 2019), section 3; METHOD: Certification.
    """

    ABSTAIN = ABSTAIN

    def __init__(self, base_classifier, num_classes: int, sigma: float):
        if isinstance(base_classifier, nn.Module):
            base_classifier.eval()
        self.base_classifier = base_classifier
        self.num_classes = num_classes
        self.sigma = sigma

    def certify(
        self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int, generator: Generator | None = None
    ) -> tuple[int, float]:
        """With probability at least 1 - alpha over its draws, g is constant within the returned L2 radius of x.

        n0 draws choose the class, n fresh draws bound its probability (one-sided Clopper-Pearson); the claim needs the
        two to be independent. Returns (class, radius), or (ABSTAIN, 0.0) where the bound is below 1/2.

        x [C, H, W] lies on the device that computes; `generator`, if given, too. sigma and the radius are in x's units.
        """
        selection = self.count_votes(x, n0, batch_size, generator)[-1]
        estimation = self.count_votes(x, n, batch_size, generator)[-1]
        return certificate(selection, estimation, alpha, self.sigma)

    def predict(self, x: Tensor, n: int, alpha: float, batch_size: int, generator: Generator | None = None) -> int:
        """With probability at least 1 - alpha over its n draws, the returned class is g(x) or ABSTAIN.

        The two classes with most votes are compared by a two-sided binomial test (Hung and Fithian, 2019).
        """
        return prediction(self.count_votes(x, n, batch_size, generator)[-1], alpha)

    @torch.inference_mode()
    def count_votes(self, x: Tensor, n: int, batch_size: int, generator: Generator | None = None) -> Tensor:
        """Votes of n independent noisy copies of x: [V, K] integers on the CPU, each row sums to n.

        The last row is the ensemble's (summed logits), the rows before it are the heads' own, V = L + 1; one head is
        its own ensemble, V = 1. All rows count the same forward passes.
        """
        counts = torch.zeros((), dtype=torch.int64, device=x.device)
        for start in range(0, n, batch_size):
            shape = (min(batch_size, n - start), *x.shape)
            noise = torch.randn(shape, device=x.device, dtype=x.dtype, generator=generator)
            counts = counts + self._votes(x + self.sigma * noise)
        return counts.cpu()

    def _votes(self, images: Tensor) -> Tensor:
        logits = self.base_classifier(images).float()  # [L, N, K]
        if logits.dim() == 2:
            logits = logits.unsqueeze(0)
        if len(logits) > 1:
            logits = torch.cat([logits, logits.sum(0, keepdim=True)])  # [V, N, K]
        votes = logits.argmax(-1)  # [V, N]
        voters = torch.arange(len(votes), device=votes.device).unsqueeze(1)
        cells = (votes + voters * self.num_classes).flatten()
        return torch.bincount(cells, minlength=len(votes) * self.num_classes).view(-1, self.num_classes)


def certificate(selection: Tensor, estimation: Tensor, alpha: float, sigma: float) -> tuple[int, float]:
    """(class, radius) from the votes [K] of the selection draws and of independent estimation draws; see `certify`."""
    chosen = int(selection.argmax())
    radius = radius_of(lower_confidence_bound(int(estimation[chosen]), int(estimation.sum()), alpha), sigma)
    return (ABSTAIN, 0.0) if radius is None else (chosen, radius)


def prediction(counts: Tensor, alpha: float) -> int:
    """The class with most votes of [K], or ABSTAIN where the runner-up may well be the winner; see `predict`."""
    first, second = (int(index) for index in counts.argsort(descending=True, stable=True)[:2])
    most, next_most = int(counts[first]), int(counts[second])
    return ABSTAIN if binomtest(most, most + next_most, 0.5).pvalue > alpha else first
