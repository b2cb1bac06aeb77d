"""The smoothed classifier: votes over Gaussian noise, prediction, certified radius. Knows no data set, file or flag."""

import itertools
import time
from collections import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Generator, Tensor, nn

from spacte.bounds import anytime_lower_bound, lower_confidence_bound, radius_of
from spacte.noise import GaussianNoise

ABSTAIN = -1
Asks = abc.Generator[int, Tensor, object]  # see Drawing
_FIRST_LOOK = 100  # draws before a stopping rule is asked for the first time


class Smooth:
    """g(x) = the class that the heads' summed logits choose most often on x + N(0, sigma^2 I).

    `base_classifier` maps [N, C, H, W] to logits [L, N, K] (or [N, K], one head) and must treat each image of a batch
    on its own: a module is put into eval mode. `noise` draws the noisy copies (spacte.noise; default: float32 normals).
    Source: Cohen et al. (ICML 2019), section 3; heads as in arXiv 2211.10882.
    """

    ABSTAIN = ABSTAIN

    def __init__(self, base_classifier, num_classes: int, sigma: float, noise=None):
        if isinstance(base_classifier, nn.Module):
            base_classifier.eval()
        self.base_classifier = base_classifier
        self.num_classes = num_classes
        self.sigma = sigma
        self.noise = noise or GaussianNoise(sigma)
        if self.noise.sigma != sigma:
            raise ValueError(f"the noise's sigma is {self.noise.sigma}, the classifier's {sigma}")

    def certify(
        self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int, generator: Generator | None = None
    ) -> tuple[int, float]:
        """With probability at least 1 - alpha over its draws, g is constant within the returned L2 radius of x.

        n0 draws choose the class, n fresh draws bound its probability (one-sided Clopper-Pearson); the claim needs the
        two to be independent. Returns (class, radius), or (ABSTAIN, 0.0) where the bound is below 1/2.

        x [C, H, W] lies on the device that computes; `generator`, if given, too. sigma and the radius are in x's units.
        """
        asks = selection_and_estimation(n0, n, batch_size)
        (drawing,) = self.count_together([Drawing(x, generator, asks)], batch_size)
        rule = CertificateRule(alpha - self.noise.slack(x.numel(), n), self.sigma)
        return rule.certificate(*(votes[-1] for votes in drawing.result))

    def predict(self, x: Tensor, n: int, alpha: float, batch_size: int, generator: Generator | None = None) -> int:
        """With probability at least 1 - alpha over its n draws, the returned class is g(x) or ABSTAIN.

        The two classes with most votes are compared by a two-sided binomial test (Hung and Fithian, 2019).
        """
        return prediction(self.count_votes(x, n, batch_size, generator)[-1], alpha - self.noise.slack(x.numel(), n))

    def count_votes(self, x: Tensor, n: int, batch_size: int, generator: Generator | None = None) -> Tensor:
        """Votes of n independent noisy copies of x: [V, K] integers on the CPU, each row sums to n.

        The last row is the ensemble's (summed logits), the rows before it are the heads' own, V = L + 1; one head is
        its own ensemble, V = 1. All rows count the same forward passes.
        """
        (drawing,) = self.count_together([Drawing(x, generator, tally(n, batch_size))], batch_size)
        return drawing.result

    @torch.inference_mode()
    def count_together(self, drawings: Iterable["Drawing"], batch_size: int) -> Iterator["Drawing"]:
        """Count the votes that each drawing asks for; yields the drawings as they finish, the oldest mostly first.

        Batches of at most `batch_size` noisy copies are filled in the drawings' order, with whole portions; a new one
        is begun when there is room. A portion is drawn by its own image's generator, so that an image's noise does not
        depend on which images share its batches, and the votes are counted on the device.
        """
        active: list[Drawing] = []

        def begin() -> Iterator[Drawing]:
            """The drawings, each active from when it is taken."""
            for drawing in drawings:
                active.append(drawing)
                yield drawing

        fresh, since = begin(), time.monotonic()
        while True:
            room, batch = batch_size, []
            for drawing in itertools.chain(list(active), fresh):
                if drawing.wanted <= room:
                    batch.append(drawing)
                    room -= drawing.wanted
                elif drawing is active[-1]:
                    break  # while the youngest does not fit, no other is begun
                if room == 0:
                    break
            if not batch and active:
                raise ValueError(f"{active[0].wanted} copies are wanted at once, but a batch has {batch_size}")
            if not batch:
                return
            sizes = [drawing.wanted for drawing in batch]
            copies = [self.noise(drawing.x, drawing.wanted, drawing.generator) for drawing in batch]
            for drawing, votes in zip(batch, self._votes(_joined(copies), sizes), strict=True):
                drawing.take(votes)
            finished = [drawing for drawing in batch if not drawing.wanted]
            if finished:  # they have waited for the device: the time since the last wait is shared by copies
                seconds, copies = time.monotonic() - since, sum(drawing.unpaid for drawing in active)
                for drawing in active:
                    drawing.seconds += seconds * drawing.unpaid / copies
                    drawing.unpaid = 0
                active[:] = [drawing for drawing in active if drawing.wanted]
                since += seconds
                yield from finished

    def _votes(self, images: Tensor, sizes: list[int]) -> list[Tensor]:
        logits = self.base_classifier(images).float()  # [L, N, K]
        if logits.dim() == 2:
            logits = logits.unsqueeze(0)
        if len(logits) > 1:
            logits = torch.cat([logits, logits.sum(0, keepdim=True)])  # [V, N, K]
        votes = logits.argmax(-1)  # [V, N]
        counts = votes.new_zeros(len(votes), self.num_classes)
        return [counts.scatter_add(1, part, torch.ones_like(part)) for part in votes.split(sizes, dim=1)]


@dataclass(frozen=True)
class CertificateRule:
    """How votes become a certificate that holds with probability at least 1 - alpha.

    `sequential`: the number of estimation draws may depend on what was drawn, so the bound is the anytime-valid one.
    """

    alpha: float
    sigma: float
    sequential: bool = False

    def radius(self, n_a: int, n: int) -> float | None:
        """The radius that n_a of n votes certify; None where they certify none."""
        if self.alpha <= 0:
            return None
        bound = anytime_lower_bound if self.sequential else lower_confidence_bound
        return radius_of(bound(n_a, n, self.alpha), self.sigma)

    def certificate(self, selection: Tensor, estimation: Tensor) -> tuple[int, float]:
        """(class, radius) from the votes [K] of the selection draws and of independent estimation draws.

        (ABSTAIN, 0.0) where the class's bound is below 1/2; (class, 0.0), which claims nothing, where nothing was drawn
        to estimate it.
        """
        chosen, n = int(selection.argmax()), int(estimation.sum())
        if n == 0:
            return chosen, 0.0
        radius = self.radius(int(estimation[chosen]), n)
        return (ABSTAIN, 0.0) if radius is None else (chosen, radius)


class Drawing:
    """One image x [C, H, W] whose noisy copies are counted.

    `asks` is a generator that yields how many copies it wants next, is sent their votes [V, K] and returns the
    `result`; `key` says whose it is. `seconds` is its share of the time, by copies.
    """

    def __init__(self, x: Tensor, generator: Generator | None, asks: Asks, key=None):
        self.x, self.generator, self.asks, self.key = x, generator, asks, key
        self.wanted, self.result = next(asks), None
        self.seconds, self.unpaid = 0.0, 0  # unpaid: copies whose time is not in `seconds` yet

    def take(self, votes: Tensor) -> None:
        """Hand over the votes of the copies that it wanted; then it wants more, or is finished and wants 0."""
        self.unpaid += self.wanted
        try:
            self.wanted = self.asks.send(votes)
        except StopIteration as end:
            self.wanted, self.result = 0, end.value


def tally(n: int, batch_size: int, enough: Callable[[Tensor], bool] | None = None) -> Asks:
    """Asks for n copies in portions of at most `batch_size`; returns their votes, [V, K] on the CPU.

    `enough`, asked with the votes so far after 100 copies and then whenever a quarter more (at most a batch) has been
    drawn, may end it early. Without it nothing waits for the device before the end.
    """
    counts = 0
    for size in portions(n, batch_size, looks=enough is not None):
        counts = counts + (yield size)
        if enough and enough(counts.cpu()):
            break
    return counts.cpu()


def selection_and_estimation(
    n0: int,
    n: int,
    batch_size: int,
    voter: int = -1,
    enough: Callable[[int, int], bool] | None = None,
    wanted: int | None = None,
) -> Asks:
    """Asks for n0 copies that select `voter`'s class, then for n that bound its probability; returns both tallies.

    The two are disjoint draws of one stream, hence independent, as a certificate needs. `enough`, if any, says of
    (votes for the selected class, draws) whether estimation may end. Where another class than `wanted` is selected,
    nothing is drawn to estimate it.
    """
    selection = yield from tally(n0, batch_size)
    chosen = int(selection[voter].argmax())
    if wanted is not None and chosen != wanted:
        return selection, selection.new_zeros(selection.shape)
    look = enough and (lambda counts: enough(int(counts[voter, chosen]), int(counts[voter].sum())))
    return selection, (yield from tally(n, batch_size, look))


def portions(n: int, batch_size: int, looks: bool) -> Iterator[int]:
    """How n draws are divided: into batches; for a rule that `looks` between them, 100 first, then a quarter more."""
    drawn = 0
    while drawn < n:
        size = min(batch_size, n - drawn)
        if looks:
            size = min(size, max(_FIRST_LOOK, drawn // 4))
        yield size
        drawn += size


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def prediction(counts: Tensor, alpha: float) -> int:
    """The class with most votes of [K], or ABSTAIN where the runner-up may well be the winner; see `predict`."""
    first, second = (int(index) for index in counts.argsort(descending=True, stable=True)[:2])
    most, next_most = int(counts[first]), int(counts[second])
    return ABSTAIN if binomtest(most, most + next_most, 0.5).pvalue > alpha else first
