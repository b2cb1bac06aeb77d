"""What the base defences' training objectives share. A defence is a subclass of `Objective` in its own folder."""

import math
from argparse import ArgumentParser, Namespace

import torch
from torch import Tensor, nn

from spacte.teaching import CircularLoss, pace_threshold


class Objective:
    """A base defence: called with (classifier, images, labels, epoch), returns the loss and its named parts.

    images [B, C, H, W] in [0, 1], labels [B], epoch from 1; the loss and every part are scalars on their device.
    `args` holds the training flags, those of `add_flags` too.
    """

    name: str  # as tables call the defence

    @staticmethod
    def add_flags(parser: ArgumentParser) -> None:
        """Add the flags that only this defence has."""

    @staticmethod
    def run_suffix(args: Namespace) -> str:
        """What the run's name ends in, behind the settings that every defence has."""
        return ""

    def __init__(self, args: Namespace, num_classes: int):
        self.args = args
        self.num_classes = num_classes

    def __call__(self, classifier, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and its parts by name; see the class."""
        raise NotImplementedError

    def threshold(self, epoch: int) -> float:
        """lambda(epoch), the pace of circular teaching; infinite, so that every weight is 1, with --no_teaching."""
        if self.args.no_teaching:
            return math.inf
        return pace_threshold(epoch, self.args.epochs, self.num_classes, self.args.lbdlast)

    def cosine_loss(self, classifier: nn.Module) -> Tensor:
        """L_cos of the classifier's network, a scalar; 0 with --no_cosine."""
        if self.args.no_cosine:
            return torch.zeros((), device=next(classifier.parameters()).device)
        return unwrapped(classifier)[-1].cosine_loss()

    def draw_noises(self, images: Tensor) -> Tensor:
        """m Gaussian noise vectors an image, with deviation noise_sd: [B, C, H, W] -> [m, B, C, H, W]."""
        shape = (self.args.num_noise_vec, *images.shape)
        return torch.randn(shape, device=images.device) * self.args.noise_sd


def unwrapped(classifier: nn.Module) -> nn.Sequential:
    """The classifier itself, without DistributedDataParallel around it."""
    return getattr(classifier, "module", classifier)


def named_parts(loss: CircularLoss, **others: Tensor) -> dict[str, Tensor]:
    """The parts that every defence logs (L_ce, mean weight, share of easy samples, each head's loss) and `others`."""
    heads = {f"head{h}": head for h, head in enumerate(loss.heads)}
    return {"ce": loss.ce, **others, "weight": loss.weights.mean(), "easy": loss.easy, **heads}
