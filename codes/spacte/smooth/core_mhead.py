"""The smoothed classifier: votes over Gaussian noise, prediction, certified radius. Knows no data set, file or flag."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from spacte.model.ensemble import Consensus
from spacte.model.passes import concatenated, in_passes
from spacte.smooth.certificates import ABSTAIN, Certificate, prediction
from spacte.smooth.counting import VotesByConsensus, VotesOfAll
from spacte.smooth.noise import GaussianNoise
from spacte.utils import RunError

_FIRST_LOOK = 100  # draws before a stopping rule is first asked


class Smooth:
    """g(x) = the class that the heads' summed logits choose most often on x + N(0, sigma^2 I).

    `base_classifier` maps [N, C, H, W] to logits [L, N, K] (or [N, K], one head) and must treat each image of a batch
    on its own: a module is put into eval mode. `noise` draws the noisy copies (spacte.smooth.noise; default: float32
    normals). With a `consensus` of K, the base classifier's class is the one that the first K heads agree on, else that
    of the heads' summed logits: see spacte.model.ensemble.Consensus; of the heads the first K alone then vote, too.
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

    def __init__(self, base_classifier, num_classes: int, sigma: float, noise=None, consensus: int | None = None):
        if isinstance(base_classifier, nn.Module):
            base_classifier.eval()
        self.base_classifier = base_classifier
        self.num_classes = num_classes
        self.sigma = sigma
        self.noise = noise or GaussianNoise(sigma)
        if consensus is not None and consensus < 1:
            raise ValueError(f"a consensus of {consensus}: it must be of at least 1 head")
        self.consensus = None if consensus is None else Consensus(base_classifier, consensus)
        self._votes = VotesOfAll(base_classifier) if consensus is None else VotesByConsensus(self.consensus)
        if self.noise.sigma != sigma:
            raise ValueError(f"the noise's sigma is {self.noise.sigma}, the classifier's {sigma}")

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
        (sample,) = self.sample([Sample(x, generator, Draws(n0, n))], batch_size)
        rule = Certificate(alpha - self.noise.slack(x.numel(), n), self.sigma, kind=certificate)
        return rule(sample.selection[-1], sample.estimation[-1])

    def predict(self, x: Tensor, n: int, alpha: float, batch_size: int, generator: Generator | None = None) -> int:
        """With probability at least 1 - alpha over its n draws, the returned class is g(x) or ABSTAIN.

        The two classes with most votes are compared by a two-sided binomial test (Hung and Fithian, 2019).
        """
        return prediction(self.count_votes(x, n, batch_size, generator)[-1], alpha - self.noise.slack(x.numel(), n))

    def count_votes(self, x: Tensor, n: int, batch_size: int, generator: Generator | None = None) -> np.ndarray:
        """Votes of n independent noisy copies of x: [V, K] integers, each row sums to n.

        The last row is the ensemble's (summed logits), the rows before it are the heads' own, V = L + 1; one head is
        its own ensemble, V = 1. All rows count the same forward passes. Raises RunError where logits are not finite.
        """
        (sample,) = self.sample([Sample(x, generator, Draws(0, n))], batch_size)
        return sample.estimation

    @torch.inference_mode()
    def sample(self, samples: Iterable["Sample"], batch_size: int) -> Iterator["Sample"]:
        """Draw each sample's noisy copies and count their votes; yields the samples as they finish, the oldest mostly
        first.

        Batches of at most `batch_size` noisy copies are filled in the samples' order, with whole portions; a new one is
        begun when there is room. A portion is drawn by its own image's generator, so that an image's noise does not
        depend on which images share its batches, and the votes are counted on the device. If the network's passes are
        halved because memory is short, it rounds differently: images in progress are drawn again, with the same noise,
        for a certificate is about one function.
        """
        active: list[Sample] = []
        parts = in_passes(self.base_classifier)
        passes = [one.most for one in parts]

        def begin() -> Iterator[Sample]:
            """The samples, each active from when it is taken."""
            for sample in samples:
                sample.begin(batch_size)
                active.append(sample)
                yield sample

        fresh, since = begin(), time.monotonic()
        while True:
            room, batch = batch_size, []
            for sample in itertools.chain(list(active), fresh):
                if sample.wanted <= room:  # whole portions only: a portion's votes are one sum on the device
                    batch.append(sample)
                    room -= sample.wanted
                elif sample is active[-1]:
                    break  # while the youngest does not fit, no other is begun
                if room == 0:
                    break
            if not batch:
                return
            sizes = [sample.wanted for sample in batch]
            copies = [self.noise(sample.x, sample.wanted, sample.generator) for sample in batch]
            for sample, votes in zip(
                batch, self._votes.of(concatenated(copies, 0), sizes, self.num_classes), strict=True
            ):
                sample.add(votes)
            # the only wait for the device: counts that nothing depends on yet stay there
            self._read([sample for sample in batch if sample.due])
            passes_before, passes = passes, [one.most for one in parts]
            if passes != passes_before:  # smaller passes round differently: votes of both would be of two functions
                for sample in active:
                    sample.restart()
                continue
            finished = [sample for sample in batch if not sample.wanted]
            if finished:  # they have waited for the device: the time since the last wait is shared by copies
                seconds, drawn = time.monotonic() - since, sum(sample.unpaid for sample in active)
                for sample in active:
                    sample.seconds += seconds * sample.unpaid / drawn
                    sample.unpaid = 0
                active[:] = [sample for sample in active if sample.wanted]
                since += seconds
                yield from finished

    def _read(self, samples: list["Sample"]) -> None:
        """Let the samples read their votes so far. The device is waited for once, however many they are."""
        if samples:
            self._votes.settle()
            counts = torch.stack([sample.counts() for sample in samples]).cpu().numpy()  # [S, V, K + 1]
            for sample, own in zip(samples, counts, strict=True):
                sample.read(own)


@dataclass(frozen=True)
class Draws:
    """What is drawn for an image: n0 copies that select `voter`'s class, then n that estimate its probability.

    The two are disjoint draws of one stream, hence independent, as a certificate needs. `should_stop`, if given, is
    asked with the voter's selection and estimation votes [K] after 100 estimation draws, or a batch if that is smaller,
    then whenever a quarter more (at most a batch) has been drawn, and may end the estimation early. Where another class
    than `only_class` is selected, nothing is drawn to estimate it. n0 = 0 selects nothing.
    """

    n0: int
    n: int
    voter: int = -1
    should_stop: Callable[[np.ndarray, np.ndarray], bool] | None = None
    only_class: int | None = None


class Sample:
    """An image x [C, H, W], the generator of its noise, and its votes while they are drawn.

    `wanted` is the number of copies that it wants next, 0 when it is finished: `selection` and `estimation` [V, K] then
    are its votes and `seconds` its share of the time, by copies. `idx` says whose it is.
    """

    def __init__(self, x: Tensor, generator: Generator | None, draws: Draws, idx: int | None = None):
        self.x, self.generator, self.draws, self.idx = x, generator, draws, idx
        self.selection = self.estimation = None
        self.wanted, self.seconds, self.unpaid = 0, 0.0, 0  # unpaid: copies whose time is not in `seconds` yet

    def begin(self, batch_size: int) -> None:
        """Want the first portion, of at most `batch_size` copies."""
        self._batch_size = batch_size
        self._at_begin = None if self.generator is None else self.generator.get_state()
        self._begin()

    def restart(self) -> None:
        """Forget all votes and want the first portion again, with the same noise if the generator is its own."""
        if self.generator is not None:
            self.generator.set_state(self._at_begin)
        self.selection = self.estimation = None
        self._begin()

    def _begin(self) -> None:
        self._counts, self._drawn = [], 0
        self._selects = self.draws.n0 > 0
        self._want_next()

    def add(self, votes: Tensor) -> None:
        """Take the votes [V, K + 1] of the copies that it wanted, without waiting for the device."""
        self.unpaid += self.wanted
        self._counts.append(votes)
        self._drawn += self.wanted
        self._want_next()

    @property
    def due(self) -> bool:
        """Whether it must `read` its votes before more are drawn: a phase ends or `should_stop` is asked."""
        return not self.wanted or self._looks

    def counts(self) -> Tensor:
        """The phase's votes so far on the device, [V, K + 1]; all of them must be complete."""
        self._counts = [torch.stack(self._counts).sum(0)]
        return self._counts[0]

    def read(self, counts: np.ndarray) -> None:
        """Go on as its `counts`, fetched from the device, say. Raises RunError where logits were not finite."""
        votes = self._finite(counts)
        if self._selects:
            self._end_selection(votes)
        elif not self.wanted or self._should_stop(votes):
            self.wanted, self.estimation = 0, votes
            if self.selection is None:
                self.selection = np.zeros_like(votes)

    def _end_selection(self, votes: np.ndarray) -> None:
        self.selection, self._selects = votes, False
        # The estimation counts fresh draws alone: among the votes that chose the class, it is over-represented just
        # because it was chosen, and no bound would hold on them.
        self._counts, self._drawn = [], 0
        if self.draws.only_class in (None, int(votes[self.draws.voter].argmax())):
            self._want_next()
        else:
            self.estimation = np.zeros_like(votes)

    @property
    def _looks(self) -> bool:
        return not self._selects and self.draws.should_stop is not None

    def _want_next(self) -> None:
        n = self.draws.n0 if self._selects else self.draws.n
        self.wanted = portion(self._drawn, n, self._batch_size, self._looks)

    def _should_stop(self, votes: np.ndarray) -> bool:
        voter = self.draws.voter
        selection = None if self.selection is None else self.selection[voter]
        return bool(self.draws.should_stop(selection, votes[voter]))

    def _finite(self, counts: np.ndarray) -> np.ndarray:
        """The votes [V, K] of the counts, whose last column is for logits that are not finite."""
        if counts[:, -1].any():
            name = "an image" if self.idx is None else f"image idx {self.idx}"
            wrong = f"{counts[:, -1].max()} of {self._drawn} noisy copies"
            raise RunError(f"the classifier's logits are not finite on {wrong} of {name}")
        return counts[:, :-1]


def portion(drawn: int, n: int, batch_size: int, looks: bool) -> int:
    """How many of n draws come next: a batch; for a rule that `looks` in between, 100 first, then a quarter more."""
    size = min(batch_size, n - drawn)
    return min(size, max(_FIRST_LOOK, drawn // 4)) if looks else size
