"""The smoothed classifier: votes over Gaussian noise, prediction, certified radius. Knows no data set, file or flag."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from spacte.model.modes import switch_to_eval
from spacte.model.passes import concatenated, fixed_pass_modules
from spacte.smooth.certificates import ABSTAIN, Certificate, check_alpha, prediction
from spacte.smooth.draws import Draws, whole
from spacte.smooth.noise import GaussianNoise, Noise
from spacte.smooth.tally import Tally, VoteRequest, Votes
from spacte.smooth.voters import AllHeads, Consensus, disagree


class Smooth:
    """g(x) = the class that the heads' summed logits choose most often on x + N(0, sigma^2 I).

    `base_classifier` maps [N, C, H, W] to logits [L, N, K] (or [N, K], one head) and must treat each image of a batch
    on its own: a module is put into eval mode when it votes. `noise` draws the noisy copies
    (spacte.smooth.noise; default: float32 normals). With a `consensus` of C, the base classifier's class is the one on
    which the first C heads agree, or else that of all heads' summed logits (spacte.smooth.voters.Consensus). Only these
    C heads then have votes of their own, too.
    Source: Cohen et al. (ICML 2019), section 3; heads as in arXiv 2211.10882.

    What `certify` computes, for one image and in batches that hold n copies:

        def votes(n):
            noisy = x + sigma * torch.randn(n, *x.shape, generator=generator)
            return base_classifier(noisy).sum(0).argmax(-1).bincount(minlength=num_classes).numpy()

        label = votes(n0).argmax()                             # selected by draws of its own: a fixed class, so that
        p = lower_confidence_bound(votes(n)[label], n, alpha)  # the bound from fresh draws holds for its probability
        return (label, sigma * ndtri(p)) if p >= 1 / 2 else (ABSTAIN, 0.0)

    Everything else here lets many images share a batch, so that the device is never waited for without need.
    """

    ABSTAIN = ABSTAIN

    def __init__(
        self, base_classifier: Callable[[Tensor], Tensor], num_classes: int, sigma: float, noise: Noise | None = None,
        consensus: int | None = None,
    ):  # fmt: skip
        if not callable(base_classifier):
            kind = type(base_classifier).__name__
            raise ValueError(f"the base classifier is a {kind}: give a callable, of load_classifier's the .classifier")
        self.base_classifier = base_classifier
        self.num_classes = num_classes = whole("num_classes", num_classes)
        self.sigma = sigma = float(sigma)
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma {sigma}: it must be above 0, and finite")
        self.noise = noise or GaussianNoise(sigma)
        if self.noise.sigma != sigma:
            raise ValueError(f"the noise's sigma is {self.noise.sigma}, the classifier's {sigma}")
        if consensus is not None and consensus < 1:
            raise ValueError(f"a consensus of {consensus}: it must be of at least 1 head")
        self.consensus = None if consensus is None else Consensus(base_classifier, num_classes, consensus)
        self.voter = self.consensus or AllHeads(base_classifier, num_classes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):  # the noise and the voter were made for it
            raise AttributeError(f"a Smooth's {name} does not change: make another Smooth")
        super().__setattr__(name, value)

    def certify(
        self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int, generator: Generator | None = None,
        certificate: str = "cohen",
    ) -> tuple[int, float]:  # fmt: skip
        """With probability at least 1 - alpha over its draws, g is constant within the returned L2 radius of x.

        n0 draws select the class, n fresh draws bound its probability (one-sided Clopper-Pearson); the claim needs the
        two to be independent. Returns (class, radius), or (ABSTAIN, 0.0) where the bound is below 1/2. `certificate`
        "all-votes" bounds the strongest other class, too: spacte.smooth.certificates.

        x [C, H, W] lies on the device that computes; `generator`, if given, too. sigma and the radius are in x's units.
        """
        check_alpha(alpha)
        if n0 == 0:
            raise ValueError("n0 0: a certificate is of the class that n0 draws select")
        request, slack = VoteRequest(x, generator, Draws(n0, n)), self.noise.slack(x.numel(), n)
        rule = Certificate(alpha - slack, self.sigma, kind=certificate)
        (votes,) = self.count_many([request], batch_size)
        return rule(votes.selection[-1], votes.estimation[-1])

    def predict(self, x: Tensor, n: int, alpha: float, batch_size: int, generator: Generator | None = None) -> int:
        """With probability at least 1 - alpha over its n draws, the returned class is g(x) or ABSTAIN.

        The two classes with most votes are compared by a two-sided binomial test (Hung and Fithian, 2019).
        """
        check_alpha(alpha)
        return prediction(self.count_votes(x, n, batch_size, generator)[-1], alpha - self.noise.slack(x.numel(), n))

    def count_votes(self, x: Tensor, n: int, batch_size: int, generator: Generator | None = None) -> np.ndarray:
        """Votes of n independent noisy copies of x: [V, K] integers, each row sums to n.

        The last row is the ensemble's (summed logits), the rows before it are the heads' own, V = L + 1; one head is
        its own ensemble, V = 1. All rows count the same forward passes. Raises RunError if logits are not finite.
        """
        (votes,) = self.count_many([VoteRequest(x, generator, Draws(0, n))], batch_size)
        return votes.estimation

    @torch.no_grad()
    def count_many(self, requests: Iterable[VoteRequest], batch_size: int) -> Iterator[Votes]:
        """Draw the noisy copies of each requested image and count their votes; yields an image's votes when they are
        complete, usually the oldest request's first.

        Batches of at most `batch_size` noisy copies are filled in the requests' order, with whole portions; another
        image is begun when there is room. A portion is drawn by its own image's generator, so that an image's noise
        does not depend on which images share its batches, and the votes are counted on the device. If the network's
        passes are halved because memory is short, it rounds differently: images in progress are drawn again, with the
        same noise, for a certificate is about one function.
        """
        batch_size = whole("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: it must be at least 1")
        coming, active = self._check_each(requests), list[Tally]()
        in_passes = fixed_pass_modules(self.base_classifier)
        passes, since = [one.max_pass_size for one in in_passes], time.monotonic()
        self._switch_to_eval()
        while batch := _next_batch(active, coming, batch_size):
            sizes = [tally.next_portion for tally in batch]
            copies = [self.noise(tally.request.x, tally.next_portion, tally.request.generator) for tally in batch]
            classes = self.voter(concatenated(copies, 0))
            for tally, counts in zip(batch, count(classes, sizes, self.num_classes), strict=True):
                tally.add(counts)
            _read([tally for tally in batch if tally.must_read])
            passes_before, passes = passes, [one.max_pass_size for one in in_passes]
            if passes != passes_before:  # smaller passes round differently: votes of both would be of two functions
                active = [tally.restarted() for tally in active]
                continue
            finished = [tally for tally in batch if not tally.next_portion]
            if finished:  # they have waited for the device: what it has computed is done, and can be timed
                now = time.monotonic()
                _share_time(active, now - since)
                since = now
                active = [tally for tally in active if tally.next_portion]
                yield from [tally.votes() for tally in finished]
                self._switch_to_eval()  # the caller may have trained it on meanwhile

    def _check_each(self, requests: Iterable[VoteRequest]) -> Iterator[VoteRequest]:
        """The requests, as they are begun. UserError if one's image can have no such noise."""
        for request in requests:
            self.noise.check(request.x)
            yield request

    def _switch_to_eval(self) -> None:
        if isinstance(self.base_classifier, nn.Module):
            switch_to_eval(self.base_classifier)


def _next_batch(active: list[Tally], coming: Iterator[VoteRequest], batch_size: int) -> list[Tally]:
    """The tallies whose next portions fit into a batch, the oldest first; those that are begun join the active ones.

    Portions are not divided: a portion's votes are one sum on the device. While the youngest does not fit, no other is
    begun.
    """
    batch, room = list[Tally](), batch_size
    for tally in active:
        if tally.next_portion <= room:
            batch.append(tally)
            room -= tally.next_portion
    while room and (not active or (batch and batch[-1] is active[-1])):
        request = next(coming, None)
        if request is None:
            break
        active.append(Tally(request, batch_size))
        if active[-1].next_portion <= room:
            batch.append(active[-1])
            room -= active[-1].next_portion
    return batch


def count(classes: Tensor, sizes: list[int], num_classes: int) -> Tensor:
    """How often each class was named in each of P portions of these sizes: [V, N] -> [P, V + 1, K + 1].

    Column K counts the copies whose logits are not finite. Row V is no voter's: its column 1 counts the copies on which
    the voters other than the ensemble (row V - 1) name different classes, its column 0 the others. Does not wait for
    the device.
    """
    rows = torch.cat([classes, disagree(classes[:-1]).to(classes.dtype).unsqueeze(0)])
    counts = rows.new_zeros(len(sizes), len(rows), num_classes + 1)
    for row, named in zip(counts, rows.split(sizes, dim=1), strict=True):
        row.scatter_add_(1, named, torch.ones_like(named))
    return counts


def _share_time(tallies: list[Tally], seconds: float) -> None:
    """Divide the time among the tallies, by the copies that each has drawn since time was divided last."""
    drawn = sum(tally.untimed for tally in tallies)
    for tally in tallies:
        tally.seconds += seconds * tally.untimed / drawn
        tally.untimed = 0


def _read(tallies: list[Tally]) -> None:
    """Let the tallies read their votes so far. The device is waited for once, however many they are."""
    if tallies:
        counts = torch.stack([tally.counts() for tally in tallies]).cpu().numpy()  # [S, V + 1, K + 1]
        for tally, own in zip(tallies, counts, strict=True):
            tally.read(own)
