"""Our networks made fast: BatchNorm folded, channels_last, the user's precision.

It runs in fixed passes (spacte.model.passes), on a GPU as CUDA graphs of fused convolutions (spacte.model.fused).
"""

import copy
import itertools
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spacte.device import torch_defaults
from spacte.model import int8
from spacte.model.classifier import Classifier
from spacte.model.fused import fuse
from spacte.model.heads import MultiHeadNetwork
from spacte.model.passes import FixedPasses
from spacte.model.scales import Scales, calibrate
from spacte.precision import autocast
from spacte.utils import UserError

_PRECISIONS = ("fp32", "tf32", "bf16", "int8")


@torch_defaults()
def freeze(
    classifier: nn.Sequential,
    device: torch.device | str,
    precision: str = "fp32",
    batch_size: int = 1000,
    compiled: bool = False,
    scales: Scales | None = None,
) -> "FrozenClassifier":
    """A copy of `Sequential(normalise, network)` for inference: the same function except for rounding, never trained.

    images [N, C, H, W] -> logits [L, N, K], float32. `precision` "bf16" computes in bfloat16 between the normalisation
    and the linear layers (fp32 and tf32 are settings of torch: spacte.precision). "int8", on the CPU, computes in
    integers (spacte.model.int8) with `scales`, which `scales_of` measures; images that require a gradient pass the
    float32 network instead. A pass has at most `batch_size` images; on a GPU it is a CUDA graph of fused convolutions,
    and is halved while it does not fit into memory. `compiled`: through torch.compile, with constants folded.
    """
    device = torch.device(device)
    if precision not in _PRECISIONS:
        raise UserError(f"precision '{precision}': choose from {', '.join(_PRECISIONS)}")
    normalise, network = _folded(classifier)
    network.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    if precision == "int8":
        if scales is None:
            raise ValueError("int8 needs scales")
        quantised = copy.deepcopy(network)
        int8.quantise(quantised, scales.peaks, scales.shifts)
        return FrozenClassifier(normalise, quantised, device, batch_size, compiled, for_gradients=network)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.float()  # with bfloat16's 8 significant bits logits would tie
    frozen = FrozenClassifier(normalise.to(device), network, device, batch_size, compiled)
    if frozen.is_graph:
        fuse(network, widen=precision != "fp32", probe=_probe(network))
    return frozen


@torch_defaults()
def scales_of(classifier: nn.Sequential, images: Tensor, noise_sd: float) -> Scales:
    """What int8 needs to know of `Sequential(normalise, network)` besides its weights: the scales of its activations.

    Measured on training images [N, C, H, W] in [0, 1], always with the same noise; 500 are enough, and take seconds
    unless images are large. Raises UserError if this CPU cannot compute int8 or activations are not finite.
    """
    int8.check_exact()
    normalise, network = _folded(classifier)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    noise.mul_(2**16).round_().div_(2**16)  # without the last digits, in which CPUs differ
    return calibrate(network, normalise(images + noise_sd * noise.float()), noise_sd)


def _folded(classifier: nn.Sequential) -> tuple[nn.Module, MultiHeadNetwork]:
    """A copy of the normalisation and of the network, its BatchNorm folded, channels_last.

    UserError if the folded network computes something else: a BatchNorm is taken to act on the convolution before it,
    in the order in which a module names them.
    """
    if not isinstance(classifier, nn.Sequential) or len(classifier) != 2 or not hasattr(classifier[1], "heads"):
        raise UserError(
            f"a {type(classifier).__name__} cannot be frozen: give Sequential(normalise, network) with a network of "
            "this library, as load_classifier's .classifier is"
        )
    own = copy.deepcopy(classifier).eval().requires_grad_(False)
    normalise, network = own[0], cast(MultiHeadNetwork, own[1])
    if isinstance(own, Classifier):
        own.precision = "fp32"
    probe = _probe(network)
    with torch.no_grad(), autocast(probe.device, "fp32"):
        whole, before = own(probe), network(normalise(probe))
        for module in list(network.modules()):
            _fold_batchnorm(module)
        folded = network(normalise(probe))
    if not whole.isfinite().all():
        raise UserError("the network's logits are not finite on noise: has its training diverged?")
    if _differ(whole, before):
        raise UserError(
            f"a {type(classifier).__name__} cannot be frozen if it does more than normalise and call its network: "
            "remove its hooks; one with a forward of its own is certified as a module of your own"
        )
    if _differ(folded, before):
        raise UserError(
            f"{type(network).__name__} cannot be frozen: in each of its modules a BatchNorm must act on the output of "
            "the convolution that is named before it, and on nothing else"
        )
    return normalise, network.to(memory_format=torch.channels_last)


def _differ(logits: Tensor, others: Tensor) -> bool:
    """By more than rounding."""
    return bool((logits - others).abs().max() > 0.01 * (others.max() - others.min()))


def _probe(network: MultiHeadNetwork) -> Tensor:
    """Two images of noise of the smallest size, always the same ones."""
    first = next(one for one in network.modules() if isinstance(one, nn.Conv2d))
    shape = (2, first.in_channels, network.min_size, network.min_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(first.weight)
    return images.to(memory_format=torch.channels_last)


class FrozenClassifier(FixedPasses):
    """The network that `freeze` returns. Its members (spacte.model.members) are its heads, which read the trunk.

    `for_gradients` is run in place of an int8 network, which has no gradients, where images require one.
    """

    def __init__(
        self,
        normalise: nn.Module,
        network: MultiHeadNetwork,
        device: torch.device,
        batch_size: int,
        compiled: bool,
        for_gradients: MultiHeadNetwork | None = None,
    ):
        super().__init__(device, batch_size, compiled)
        self.is_graph = device.type == "cuda" and not compiled
        self.normalise, self.network, self.for_gradients = normalise, network, for_gradients
        self.dtype = next((for_gradients or network).parameters()).dtype  # of the images behind the normalisation

    def logits(self, images: Tensor) -> Tensor:
        """See FixedPasses."""
        needs_gradient = torch.is_grad_enabled() and images.requires_grad
        network = self.for_gradients if needs_gradient and self.for_gradients is not None else self.network
        return network(self._normalised(images))

    @property
    def members(self) -> int:
        """See HasMembers."""
        return len(self.network.heads)

    def first_logits(self, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """See HasMembers."""
        logits, features = self.run_in_passes(self._first, images, first, dims=(1, 0))
        return logits, features

    def other_logits(self, features: Tensor, first: int) -> Tensor:
        """See HasMembers."""
        return self.run_in_passes(self._others, features, first, few=True)[0]

    def _first(self, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        features = self.network.trunk(self._normalised(images))
        return self.network.head_logits(features, range(first)), features

    def _others(self, features: Tensor, first: int) -> Tensor:
        features = features.to(memory_format=torch.channels_last)
        return self.network.head_logits(features, range(first, self.members))

    def _normalised(self, images: Tensor) -> Tensor:
        return self.normalise(images.to(memory_format=torch.channels_last)).to(self.dtype)


def _fold_batchnorm(module: nn.Module) -> None:
    """Replace each convolution's BatchNorm, the child that follows it, by the identity, and scale its weights."""
    children = list(module.named_children())
    for (name, convolution), (next_name, batchnorm) in itertools.pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(batchnorm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(convolution, batchnorm))
            setattr(module, next_name, nn.Identity())
