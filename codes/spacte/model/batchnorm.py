"""Whether a network is the one that was trained: its BatchNorms' running statistics against those of data.

A file of the field holds weights, not the normalisation before them, nor strides, pooling or the size of the images.
Each leaves its trace in the statistics that BatchNorm kept in training: where the network here sees other ones, it is
another function.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from spacte.data.spec import DataSpec
from spacte.data.splits import random_crop
from spacte.model.heads import MultiHeadResNet
from spacte.model.normalisation import LEGAL, Constants, Normalize, are_the_same, constants, known, name_of
from spacte.utils import UserError

NEAR = 0.02  # nats; see tests/model/test_batchnorm.py for what right and wrong networks measure
_OTHER = 0.1  # nats: a layer that lies so far behind one that is near has another geometry
_TIMES_NEARER = 4
_FEWEST_BATCHES = 44  # of training: 0.9^44 = 1 % of bn1's statistics would still be those that it began with
_SIGMAS = (0.0, 0.12, 0.25, 0.5, 0.75, 1.0)  # of the field's networks
_PART = 32  # images at once


@dataclass(frozen=True)
class Fit:
    """How far the statistics of training lie from those after a normalisation, in nats, with noise of `sigma`.

    Of the first BatchNorm and of the one that lies farthest, `layer`.
    """

    values: Constants
    sigma: float
    first: float
    worst: float
    layer: str


def examined(
    network: MultiHeadResNet, name: str | None, spec: DataSpec, images: Tensor, sigma: float
) -> tuple[str, str | None]:
    """The normalisation that the network was trained with, and a line for the user or None; `name` is their own word.

    `images` [N, C, H, W] without noise, of training or test, and `sigma` that of the noise; where it fits none, those
    that the field trains with are tried. Without a name the nearest of the known normalisations is taken if it is near
    in every layer, clearly nearer than the others. A name stands unless the statistics say that the network is another.
    Raises UserError with the distances where they say so, or cannot tell.
    """
    first = next((module for module in network.modules() if isinstance(module, nn.BatchNorm2d)), None)
    if first is None:
        return name or "none", None if name else "--normalize auto takes none: the network has no BatchNorm to ask"
    batches = int(first.num_batches_tracked)  # 0 where the file does not say
    fresh = bool((first.running_mean == 0).all() and (first.running_var == 1).all())
    if fresh or 0 < batches < _FEWEST_BATCHES:
        seen = f"bn1 has seen only {batches} batches of training"
        if name:
            return name, f"{seen}: whether this is the network that was trained, its statistics do not tell"
        raise UserError(f"--normalize auto cannot tell: {seen}; give --normalize {LEGAL}")
    search = _Search(network, spec, images)
    if name:
        return name, _confirmed(search, name, constants(name, spec), sigma)
    return _recognised(search, sigma)


def _recognised(search: "_Search", sigma: float) -> tuple[str, str]:
    best, *others = search.known(sigma)
    if best.worst > NEAR:
        elsewhere = [search.known(other) for other in _SIGMAS if other != sigma]
        nearest = min(elsewhere, key=lambda fits: fits[0].worst)
        if nearest[0].worst > NEAR:
            raise UserError(f"--normalize auto cannot tell: {search.what_would_fit(best)}")
        best, *others = nearest
    name, spec = name_of(best.values, search.spec), search.spec
    rivals = [fit for fit in others if fit.worst < max(NEAR, _TIMES_NEARER * best.worst)]
    twins = [fit for fit in rivals if are_the_same(fit.values, best.values)]
    rivals = [fit for fit in rivals if fit not in twins and fit.worst < _TIMES_NEARER * best.worst]
    if rivals:
        raise UserError(
            f"--normalize auto cannot tell: {name} and {name_of(rivals[0].values, spec)} fit alike, BatchNorm's "
            f"statistics lie {best.worst:.2g} and {rivals[0].worst:.2g} nats away; give --normalize with either"
        )
    line = f"--normalize auto takes {name}: every BatchNorm's statistics lie within {best.worst:.2g} nats of these "
    line += f"images'; with noise {best.sigma:g}, not {sigma:g}, it was trained" if best.sigma != sigma else "images'"
    return name, line + "".join(f" ({name_of(twin.values, spec)} is too much like it to tell)" for twin in twins)


def _confirmed(search: "_Search", name: str, values: Constants, sigma: float) -> str | None:
    fits = [search.fit(values, sigma)]
    if fits[0].worst > NEAR:
        fits += [search.fit(values, other) for other in _SIGMAS if other != sigma]
    own = min(fits, key=lambda fit: fit.worst)
    if own.worst <= NEAR:
        return None
    best = min((search.known(fit.sigma)[0] for fit in fits), key=lambda fit: fit.worst)
    if best.worst <= NEAR and best.worst * _TIMES_NEARER < own.worst:
        raise UserError(
            f"--normalize {name} contradicts the checkpoint: BatchNorm's statistics lie {own.worst:.2g} nats from those "
            f"of the images after it, and {best.worst:.2g} after {name_of(best.values, search.spec)}"
        )
    if own.first <= NEAR and own.worst > _OTHER:
        raise UserError(_another_network(own))
    return (
        f"after --normalize {name} the statistics of {own.layer} lie {own.worst:.2g} nats from those of training, where "
        f"a right one lies below {NEAR}: are normalisation, --noise_sd and images those of training?"
    )


def _another_network(fit: Fit) -> str:
    return (
        f"the network here is not the one that was trained: bn1's statistics fit ({fit.first:.2g} nats), those of "
        f"{fit.layer} lie {fit.worst:.2g} nats away; another stride, pooling, dilation or image size has the same keys"
    )


class _Search:
    """The distances of one network, over normalisations, noise and the ways in which training shows images."""

    def __init__(self, network: MultiHeadResNet, spec: DataSpec, images: Tensor):
        self.network, self.spec = network, spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.views = [images, random_crop(images, 4)]  # networks for small images see black borders in training
            if min(images.shape[2:]) >= 64:
                zoom = v2.RandomResizedCrop(tuple(images.shape[2:]))
                self.views.append(torch.stack([zoom(image) for image in images]))
            self.noise = torch.randn(images.shape)
        self._first: dict[float, list[_FirstLayer]] = {}

    def known(self, sigma: float) -> list[Fit]:
        """The known normalisations that fit bn1 best, by how far all layers lie: at least one, at most three."""
        candidates = known(self.spec)
        near = {name: min(layer.distance(values) for layer in self.first(sigma)) for name, values in candidates.items()}
        names = sorted(near, key=near.get)
        close = [name for name in names[:3] if near[name] <= max(_TIMES_NEARER * near[names[0]], 1e-3)]
        if near[names[0]] > NEAR:
            close = names[:1]  # none fits: only the nearest one's figures are told
        return sorted((self.fit(candidates[name], sigma) for name in close), key=lambda fit: fit.worst)

    def first(self, sigma: float) -> list["_FirstLayer"]:
        """The first layer under noise, of each view."""
        if sigma not in self._first:
            self._first[sigma] = [_FirstLayer(self.network, view + sigma * self.noise) for view in self.views]
        return self._first[sigma]

    def fit(self, values: Constants, sigma: float) -> Fit:
        """The nearest view's."""
        if min(layer.distance(values) for layer in self.first(sigma)) > 1:
            first = min(layer.distance(values) for layer in self.first(sigma))
            return Fit(values, sigma, first, first, "bn1")
        fits = []
        for view in self.views:
            found = distances(nn.Sequential(Normalize(*values), self.network), view + sigma * self.noise)
            layer = max(found, key=found.get)
            fits.append(Fit(values, sigma, next(iter(found.values())), found[layer], layer.removeprefix("1.")))
        return min(fits, key=lambda fit: fit.worst)

    def what_would_fit(self, nearest: Fit) -> str:
        """What the user is told where no known normalisation fits."""
        best = min(self.first(nearest.sigma), key=lambda layer: layer.distance(nearest.values))
        fitted = self.fit(best.fitted(nearest.values), nearest.sigma)
        far = f"after {name_of(nearest.values, self.spec)}, the nearest known, the statistics of {nearest.layer} lie "
        far += f"{nearest.worst:.2g} nats from those of training, where a right one lies below {NEAR}"
        name = name_of(fitted.values, self.spec)
        if fitted.worst <= NEAR:
            return f"{far}; {name} would fit to {fitted.worst:.2g}: give --normalize {name} if it can be that"
        if fitted.first <= NEAR and fitted.worst > _OTHER:
            return f"{far}; {_another_network(fitted)}"
        return f"{far}; is --noise_sd the one of training? Give --normalize {LEGAL} (estimated: {name})"


@torch.no_grad()
def distances(classifier: nn.Module, images: Tensor) -> dict[str, float]:
    """How far the running statistics of each BatchNorm lie from what it is given for `images` [N, C, H, W], in nats.

    The mean over channels of the Kullback-Leibler divergence of two normals: of a channel's mean and variance over
    images and pixels, from those of training. BatchNorm's epsilon is part of both variances, so that dead channels lie
    at 0.
    """
    sums: dict[str, Tensor] = {}
    layers = {name: module for name, module in classifier.named_modules() if isinstance(module, nn.BatchNorm2d)}

    def hook(name: str) -> Callable:
        """Adds up what the layer is given."""

        def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
            """Of a part of the images."""
            moments = torch.stack([inputs[0].mean((0, 2, 3)), inputs[0].square().mean((0, 2, 3))]).double()
            sums[name] = sums.get(name, 0) + moments * len(inputs[0]) / len(images)

        return add

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        for part in images.split(_PART):
            classifier(part)
    finally:
        for one in hooks:
            one.remove()
    return {name: float(_nats(mean, square - mean**2, layers[name])) for name, (mean, square) in sums.items()}


def _nats(mean: Tensor, variance: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    expected = layer.running_var.double() + layer.eps
    ratio = (variance + layer.eps) / expected
    return ((mean - layer.running_mean.double()) ** 2 / expected + ratio - 1 - ratio.log()).mean() / 2


class _FirstLayer:
    """What bn1 is given after any normalisation, from one pass over the images.

    conv1 is linear: after (x - m) / s its output is sum_c a_c U_c + b_c V_c, a = 1 / s, b = -m / s, where U_c is the
    convolution of channel c of the images alone and V_c that of ones in its place. So their means and products over
    images and pixels give mean and variance after every normalisation, zero padding included.
    """

    @torch.no_grad()
    def __init__(self, network: MultiHeadResNet, images: Tensor):
        conv, self.bn1 = network.conv1, network.bn1
        channels = conv.in_channels
        weight = conv.weight.transpose(0, 1).reshape(-1, 1, *conv.kernel_size)  # [C O, 1, k, k]
        geometry = (conv.stride, conv.padding, conv.dilation)

        def parts(x: Tensor) -> Tensor:
            """[N, C, H, W] -> [N, C, O, P]."""
            return F.conv2d(x, weight, None, *geometry, groups=channels).unflatten(1, (channels, -1)).flatten(3)

        ones = parts(torch.ones_like(images[:1]))
        mean, products = [], []
        for part in images.split(8):
            both = torch.cat([parts(part), ones.expand(len(part), -1, -1, -1)], 1)  # [N, 2C, O, P]
            mean.append(both.mean((0, 3)).double() * len(part))
            both = both.permute(2, 1, 0, 3).flatten(2)  # [O, 2C, N P]
            products.append((both @ both.mT / both.shape[2]).double() * len(part))
        self.mean = sum(mean).T / len(images)  # [O, 2C]
        self.products = sum(products) / len(images)  # [O, 2C, 2C]

    def distance(self, values: Constants) -> float:
        """How far bn1's statistics of training lie from those after the normalisation, in nats."""
        mean, std = torch.tensor(values, dtype=torch.float64)
        return float(self._nats(torch.cat([1 / std, -mean / std])))

    def fitted(self, start: Constants) -> Constants:
        """The constants after which bn1 is nearest, to three digits, climbed to from `start`."""
        mean, std = torch.tensor(start, dtype=torch.float64)
        point = torch.cat([1 / std, -mean / std]).requires_grad_()
        optimizer = torch.optim.LBFGS([point], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            """The distance, with its gradient."""
            optimizer.zero_grad()
            value = self._nats(point)
            value.backward()
            return value

        optimizer.step(loss)
        a, b = point.detach().chunk(2)
        mean, std = ([float(f"{value:.3g}") for value in part] for part in ((-b / a).tolist(), (1 / a).tolist()))
        return tuple(mean), tuple(std)

    def _nats(self, weights: Tensor) -> Tensor:
        mean = self.mean @ weights
        return _nats(mean, torch.einsum("i,oij,j->o", weights, self.products, weights) - mean**2, self.bn1)
