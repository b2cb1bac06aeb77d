"""Whether a network is the one that was trained: its BatchNorms' running statistics against those of data.

A published file holds weights, not the normalisation before them, nor strides, pooling or the size of the images.
Each leaves its trace in the statistics that BatchNorm kept in training: where the network here sees other ones, it is
another function.
"""

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from spacte.data.spec import DataSpec
from spacte.data.splits import random_crop
from spacte.device import keep_rng_state, torch_defaults
from spacte.model.batchnorm import FirstLayer, batches_seen, statistics, statistics_kl
from spacte.model.heads import MultiHeadNetwork
from spacte.model.normalisation import (
    LEGAL_NORMALISATIONS,
    Constants,
    Normalize,
    are_the_same,
    constants,
    known,
    name_of,
)
from spacte.model.published import published_name
from spacte.utils import UserError

# Nats. tests/model/test_recognition.py says what right and wrong networks measured: architectures, lengths of training,
# sigmas, augmentations and defences.
_BN1_MAX_KL, _MAX_KL = 0.0025, 0.003  # of bn1, which sees the normalisation, and of any layer, which sees the geometry
_BN1_SAMPLING, _SAMPLING = 0.35, 10.0  # divided by the number of images, of their pixels in a layer: what so few add
_LAG = 1.5  # divided by the batches of training: the statistics are an average over weights that still moved
_CERTAIN = 0.001  # of bn1: no other noise is tried
_TIMES_NEARER = 4
_FEWEST_BATCHES = 44  # of training: 0.9^44 = 1 % of bn1's statistics would still be those that it began with
_SIGMAS = (0.0, 0.12, 0.25, 0.5, 0.75, 1.0)  # of published networks


@dataclass(frozen=True)
class Fit:
    """How far the statistics of training lie from those after a normalisation, in nats, with noise of `sigma` on this
    `share` of the images.

    `bn1` is the distance of the first BatchNorm. Where the other layers were compared, too, `worst` is the distance of
    the `layer` for which it is largest in proportion to its `limit`.
    """

    values: Constants
    sigma: float
    share: float
    bn1: float
    worst: float = 0.0
    limit: float = math.inf
    layer: str = "bn1"


@torch_defaults()
def check_normalisation(
    network: MultiHeadNetwork, name: str | None, spec: DataSpec, images: Tensor, sigma: float
) -> tuple[str, str | None]:
    """The normalisation that the network was trained with, and a line for the user or None; `name` is what they gave.

    `images` [N, C, H, W] without noise are training or test images, `sigma` is the noise's; where nothing fits with
    it, the sigmas of published networks are tried. Without a name the nearest of the known normalisations is taken if
    it is near in every layer, clearly nearer than the others. A name stands unless the statistics say that the network
    is another. Raises UserError with the distances if they say so, or cannot tell.
    """
    first = next((module for module in network.modules() if isinstance(module, nn.BatchNorm2d)), None)
    if first is None:
        return name or "none", None if name else "--normalize auto takes none: the network has no BatchNorm to ask"
    batches = batches_seen(first)
    mean, variance = statistics(first)
    fresh = bool((mean == 0).all() and (variance == 1).all())
    if fresh or 0 < batches < _FEWEST_BATCHES:
        seen = f"bn1 has seen only {batches} batches of training"
        if name:
            return name, f"{seen}: whether this is the network that was trained, its statistics do not tell"
        raise UserError(f"--normalize auto cannot tell: {seen}; give --normalize {LEGAL_NORMALISATIONS}")
    search = _Search(network, spec, images)
    if name:
        return name, _verify_normalisation(search, name, constants(name, spec), sigma)
    return _infer_normalisation(search, sigma)


def _infer_normalisation(search: "_Search", sigma: float) -> tuple[str, str]:
    best, *others = search.nearest_under_any_noise(sigma)
    if not search.is_near(best):
        raise UserError(f"--normalize auto cannot tell: {search.what_would_fit(best)}")
    name = search.name(best)
    rivals = [fit for fit in others if fit.bn1 < _TIMES_NEARER * best.bn1]
    twins = [fit for fit in rivals if are_the_same(fit.values, best.values)]
    rivals = [fit for fit in rivals if fit not in twins]
    if rivals:
        raise UserError(
            f"--normalize auto cannot tell: {name} and {search.name(rivals[0])} fit alike, bn1's inputs lie "
            f"{best.bn1:.2g} and {rivals[0].bn1:.2g} nats (KL) from training's; give --normalize with either"
        )
    line = f"--normalize auto takes {name}: bn1's inputs lie {best.bn1:.2g} nats (KL) from training's"
    line += f", {others[0].bn1:.2g} with {search.name(others[0])}" if others else ""
    line += f"; farthest: {best.worst:.2g} in {best.layer}"
    if best.sigma != sigma:
        line += f"; it was trained with noise {best.sigma:g}, and is evaluated with {sigma:g}"
    return name, line + "".join(f" ({search.name(twin)} is too much like it to tell)" for twin in twins)


def _verify_normalisation(search: "_Search", name: str, values: Constants, sigma: float) -> str | None:
    own = search.fit(values, sigma, 1.0)
    for noise in _other_noises(sigma):
        if not search.is_near(own):
            own = min(own, search.fit(values, *noise), key=lambda fit: (not search.is_near(fit), fit.bn1))
    best = search.nearest_under_any_noise(sigma)[0]
    if best.bn1 <= search.bn1_max_kl and own.bn1 > max(_BN1_MAX_KL, _TIMES_NEARER * best.bn1):
        raise UserError(
            f"--normalize {name} contradicts the checkpoint: bn1's inputs then lie {own.bn1:.2g} nats (KL) "
            f"from training's, {best.bn1:.2g} with {search.name(best)}"
        )
    if search.is_near(own):
        return None
    if own.bn1 <= search.bn1_max_kl and own.worst > own.limit:
        raise UserError(_another_network(own))
    return (
        f"with --normalize {name} bn1's inputs lie {own.bn1:.2g} nats (KL) from training's, where a right one "
        f"lies below {search.bn1_max_kl:.2g}: are normalisation, --noise_sd and images those of training?"
    )


def _other_noises(sigma: float) -> list[tuple[float, float]]:
    """Sigma in training and the share of its images that had noise: half of them in stability training."""
    return [(sigma, 0.5), *((other, 1.0) for other in _SIGMAS if other != sigma)]


def _another_network(fit: Fit) -> str:
    return (
        f"the network here is not the one that was trained: bn1's statistics fit ({fit.bn1:.2g} nats), those of "
        f"{fit.layer} lie {fit.worst:.2g} nats away (limit {fit.limit:.2g}); another stride, pooling, dilation or "
        "image size has the same keys. Build it as it was trained: --classifier FILE.py:function"
    )


class _Search:
    """The distances of one network, over normalisations, noise and the ways in which training shows images."""

    def __init__(self, network: MultiHeadNetwork, spec: DataSpec, images: Tensor):
        self.network, self.spec = copy.deepcopy(network).to(images.device), spec
        self.bn1_max_kl = _BN1_MAX_KL + _BN1_SAMPLING / len(images)
        batches = batches_seen(cast(nn.BatchNorm2d, network.bn1))
        self.max_kl = _MAX_KL + (_LAG / batches if batches else 0)
        with keep_rng_state(torch.device("cpu")):
            torch.default_generator.manual_seed(0)  # no GPU's generator
            whole = images.cpu()
            views = [whole, random_crop(whole, 4)]  # networks for small images see black borders in training
            if min(images.shape[2:]) >= 64:
                zoom = v2.RandomResizedCrop(tuple(images.shape[2:]))
                views.append(torch.stack([zoom(image) for image in whole]))
            self.noise = torch.randn(images.shape).to(images.device)
        self.views = [view.to(images.device) for view in views]
        self._layers: dict[tuple[float, float], list[FirstLayer]] = {}

    def name(self, fit: Fit) -> str:
        """The name of the fit's normalisation."""
        return name_of(fit.values, self.spec)

    def is_near(self, fit: Fit) -> bool:
        """Whether the network is the one that was trained, as far as statistics tell."""
        return fit.bn1 <= self.bn1_max_kl and fit.worst <= fit.limit

    def nearest_known(self, sigma: float, share: float = 1.0) -> list[Fit]:
        """The known normalisations, the nearest to bn1 first; it alone is followed through all layers."""
        fits = []
        for values in known(self.spec).values():
            bn1 = min(layer.distance(values) for layer in self.first_layers(sigma, share))
            fits.append(Fit(values, sigma, share, bn1))
        best, *others = sorted(fits, key=lambda fit: fit.bn1)
        return [self.fit(best.values, sigma, share), *others]

    def nearest_under_any_noise(self, sigma: float) -> list[Fit]:
        """The same for this noise or, where none is surely near, for another with which one is nearer."""
        found = self.nearest_known(sigma)
        if self.is_near(found[0]) and found[0].bn1 <= _CERTAIN:
            return found
        everywhere = [found, *(self.nearest_known(*noise) for noise in _other_noises(sigma))]
        near = [fits for fits in everywhere if self.is_near(fits[0])]
        return min(near, key=lambda fits: fits[0].bn1) if near else found

    def noised(self, view: Tensor, sigma: float, share: float) -> Tensor:
        """The images of a view with noise, the last ones if not all."""
        noise = sigma * self.noise
        noise[: round((1 - share) * len(noise))] = 0
        return view + noise

    def first_layers(self, sigma: float, share: float) -> list["FirstLayer"]:
        """The first layer under noise, of each view."""
        if (sigma, share) not in self._layers:
            layers = [FirstLayer(self.network, self.noised(view, sigma, share)) for view in self.views]
            self._layers[sigma, share] = layers
        return self._layers[sigma, share]

    def fit(self, values: Constants, sigma: float, share: float) -> Fit:
        """The fit in the view that is nearest in bn1; the other layers are compared only where bn1 is near."""
        of_views = [layer.distance(values) for layer in self.first_layers(sigma, share)]
        bn1 = min(of_views)
        if bn1 > self.bn1_max_kl:
            return Fit(values, sigma, share, bn1)
        view = self.noised(self.views[of_views.index(bn1)], sigma, share)
        found = statistics_kl(nn.Sequential(Normalize(*values).to(view.device), self.network), view)
        limits = {name: self.max_kl + _SAMPLING / (len(view) * pixels) for name, (_, pixels) in found.items()}
        limits["1.bn1"] = self.bn1_max_kl
        layer = max(found, key=lambda name: found[name][0] / limits[name])
        return Fit(values, sigma, share, bn1, found[layer][0], limits[layer], self.in_file(layer))

    def in_file(self, layer: str) -> str:
        """A layer's name in published files."""
        stages = sum(1 for name, _ in self.network.named_children() if name.startswith("layer"))
        return published_name(layer, stages + 1)

    def what_would_fit(self, nearest: Fit) -> str:
        """What the user is told where no known normalisation fits."""
        if nearest.bn1 <= self.bn1_max_kl:
            return _another_network(nearest)
        layers = self.first_layers(nearest.sigma, nearest.share)
        fits = [self.fit(layer.fitted(nearest.values), nearest.sigma, nearest.share) for layer in layers]
        fitted = min(fits, key=lambda fit: fit.bn1)
        far = f"with {self.name(nearest)}, the nearest known, bn1's inputs lie {nearest.bn1:.2g} nats (KL) from "
        far += f"training's, where a right one lies below {self.bn1_max_kl:.2g}"
        if self.is_near(fitted):
            name = self.name(fitted)
            return f"{far}; {name} would fit to {fitted.bn1:.2g}: give --normalize {name} if it can be that"
        if fitted.bn1 <= self.bn1_max_kl:
            return f"{far}; {_another_network(fitted)}"
        legal = f"{LEGAL_NORMALISATIONS} (estimated: {self.name(fitted)})"
        return f"{far}; is --noise_sd the one of training? Give --normalize {legal}"
