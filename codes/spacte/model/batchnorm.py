"""BatchNorm's running statistics: how far those of training lie from those of data, in nats, and how to keep them."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spacte.model.heads import MultiHeadNetwork
from spacte.model.normalisation import Constants

_PART = 128  # images at once


@torch.no_grad()
def statistics_kl(classifier: nn.Module, images: Tensor) -> dict[str, tuple[float, int]]:
    """How far the running statistics of each BatchNorm lie from what it is given for `images` [N, C, H, W], in nats,
    and how many pixels it is given of an image.

    The distance is the mean over channels of the Kullback-Leibler divergence KL(data || training) of two normals, which
    have the channel's mean and variance over images and pixels, and those of training. BatchNorm's epsilon is part of
    both variances, so that dead channels lie at 0. As in training, each layer normalises by its batch's statistics: the
    running ones lag behind the weights, and differences would grow from layer to layer.
    """
    classifier = copy.deepcopy(classifier)
    sums: dict[str, Tensor] = {}
    pixels: dict[str, int] = {}
    trained = {name: module for name, module in classifier.named_modules() if isinstance(module, nn.BatchNorm2d)}
    kept = {name: statistics(layer) for name, layer in trained.items()}

    def hook(name: str) -> Callable:
        """A hook that adds up the layer's inputs."""

        def add(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
            """Add one part of the images."""
            moments = torch.stack([inputs[0].mean((0, 2, 3)), inputs[0].square().mean((0, 2, 3))]).double()
            sums[name] = sums.get(name, torch.zeros(())) + moments * len(inputs[0]) / len(images)
            pixels[name] = inputs[0][0, 0].numel()

        return add

    for name, layer in trained.items():
        layer.running_mean = layer.running_var = None  # the batch's own are taken
        layer.register_forward_pre_hook(hook(name))
    parts = max(1, len(images) // _PART)
    for number in range(parts):  # interleaved: each part has its share of those with noise
        classifier(images[number::parts])
    return {
        name: (float(_mean_kl(mean, square - mean**2, *kept[name], trained[name].eps)), pixels[name])
        for name, (mean, square) in sums.items()
    }


def _mean_kl(mean: Tensor, variance: Tensor, trained_mean: Tensor, trained_variance: Tensor, eps: float) -> Tensor:
    expected = trained_variance.double() + eps
    ratio = (variance + eps) / expected
    return ((mean - trained_mean.double()) ** 2 / expected + ratio - 1 - ratio.log()).mean() / 2


def statistics(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and variance of training; the layers of these networks track them."""
    return cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)


def batches_seen(layer: nn.BatchNorm2d) -> int:
    """How many batches of training the statistics come from; 0 where the file does not say."""
    return int(cast(Tensor, layer.num_batches_tracked))


class FirstLayer:
    """What bn1 is given after any normalisation, from one pass over the images.

    conv1 is linear: after (x - m) / s its output is sum_c a_c U_c + b_c V_c, a = 1 / s, b = -m / s, where U_c is the
    convolution of channel c of the images alone and V_c that of ones in its place. So their means and products over
    images and pixels give mean and variance after every normalisation, zero padding included.
    """

    @torch.no_grad()
    def __init__(self, network: MultiHeadNetwork, images: Tensor):
        conv, bn1 = cast(nn.Conv2d, network.conv1), cast(nn.BatchNorm2d, network.bn1)
        channels = conv.in_channels
        weight = conv.weight.transpose(0, 1).reshape(-1, 1, *conv.kernel_size)  # [C O, 1, k, k]
        stride, padding, dilation = (cast(tuple[int, int], one) for one in (conv.stride, conv.padding, conv.dilation))

        def parts(x: Tensor) -> Tensor:
            """[N, C, H, W] -> [N, C, O, P]."""
            found = F.conv2d(x, weight, None, stride, padding, dilation, groups=channels)
            return found.unflatten(1, (channels, -1)).flatten(3)

        ones = parts(torch.ones_like(images[:1]))
        mean, products = [], []
        for part in images.split(8):
            both = torch.cat([parts(part), ones.expand(len(part), -1, -1, -1)], 1)  # [N, 2C, O, P]
            mean.append(both.mean((0, 3)).double() * len(part))
            both = both.permute(2, 1, 0, 3).flatten(2)  # [O, 2C, N P]
            products.append((both @ both.mT / both.shape[2]).double() * len(part))
        self.mean = (torch.stack(mean).sum(0).T / len(images)).cpu()  # [O, 2C]
        self.products = (torch.stack(products).sum(0) / len(images)).cpu()  # [O, 2C, 2C]
        trained_mean, trained_variance = statistics(bn1)
        self.trained = (trained_mean.cpu(), trained_variance.cpu(), bn1.eps)

    def distance(self, values: Constants) -> float:
        """How far bn1's statistics of training lie from those after the normalisation, in nats."""
        mean, std = torch.tensor(values, dtype=torch.float64)
        return float(self._mean_kl(torch.cat([1 / std, -mean / std])))

    def fitted(self, start: Constants) -> Constants:
        """The constants after which bn1 is nearest, to three digits, climbed to from `start`."""
        mean, std = torch.tensor(start, dtype=torch.float64)
        point = torch.cat([1 / std, -mean / std]).requires_grad_()
        optimizer = torch.optim.LBFGS([point], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            """The distance, with its gradient."""
            optimizer.zero_grad()
            value = self._mean_kl(point)
            value.backward()
            return value

        optimizer.step(loss)
        a, b = point.detach().chunk(2)
        mean, std = ([float(f"{value:.3g}") for value in part] for part in ((-b / a).tolist(), (1 / a).tolist()))
        return tuple(mean), tuple(std)

    def _mean_kl(self, weights: Tensor) -> Tensor:
        mean = self.mean @ weights
        variance = torch.einsum("i,oij,j->o", weights, self.products, weights) - mean**2
        return _mean_kl(mean, variance, *self.trained)


@contextlib.contextmanager
def keep_running_statistics(classifier: nn.Module) -> Iterator[None]:
    """Within it BatchNorm in training mode uses a batch's own statistics, and leaves the running ones as they are."""
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    norms = [norm for norm in norms if norm.training and norm.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
