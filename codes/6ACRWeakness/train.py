"""Train a multi-head network with circular teaching on what counts for the ACR (Sun et al., ICML 2025).

    python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.5 --num_heads 5 --lbdlast 1.6 \\
        --ds_epoch 70 --ds_threshold 0.4 --attack_steps 6 --epsilon 0.25
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from dataclasses import dataclass

import numpy as np
import torch

import sampling
from attack import attack
from circular_teaching import ct_loss
from spacte.cli import image_norm, non_negative_int, positive_int, probability
from spacte.device import default_batch_size
from spacte.model.frozen import freeze
from spacte.model.noisy import noisy_logits
from spacte.smooth.poll import poll
from spacte.smooth.smooth import Smooth
from spacte.train import command
from spacte.train.objective import Objective, unwrapped
from spacte.utils import RunError, UserError


@dataclass
class ACRWeakness(Objective):
    """L_ce + L_cos, and after `ds_epoch` epochs: on adversarial noise, without the images that the smoothed ensemble
    mostly gets wrong, and more often on those that it is sure of.
    """

    ds_epoch: int = 60
    ds_threshold: float = 0.5
    num_noise_ds: int = 100
    dataset_weight_epoch: int = 10
    num_noise_dataset_weight: int = 16
    attack_steps: int = 3
    epsilon: float = 0.25

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        add = parser.add_argument
        add("--ds_epoch", type=non_negative_int, help="epochs of plain noise, before images are chosen and weighted")
        add("--ds_threshold", type=probability, help="images with a smaller share of right votes are left out")
        add("--num_noise_ds", type=positive_int, help="votes per image that decide whether it is left out")
        add("--dataset_weight_epoch", type=positive_int, help="epochs between two reweightings of the images")
        add("--num_noise_dataset_weight", type=positive_int, help="votes per image for its weight")
        add("--attack_steps", type=non_negative_int, help="maximal attack steps on a noise")
        add("--epsilon", type=image_norm, help="L2 length of such a step, in units of [0, 1]")

    def __post_init__(self):
        """UserError if images would never be left out, or too few votes weight them."""
        if self.ds_epoch >= self.recipe.epochs:
            last = self.recipe.epochs - 1
            raise UserError(f"--ds_epoch {self.ds_epoch} must lie in 0..{last}, below --epochs")
        sampling.check_votes(self.num_noise_dataset_weight)
        self.weights = None  # [n], 0 for an image that is left out
        self.share_kept = 1.0  # of the images

    def run_suffix(self):
        """When and which images are left out, and the attack."""
        return f"-ds-{self.ds_epoch}-{self.ds_threshold}-steps-{self.attack_steps}-epsilon-{self.epsilon}"

    def sampling_weights(self, epoch, classifier, split):
        """None before `ds_epoch` epochs are done; then images are left out once and the others weighted repeatedly."""
        since = epoch - 1 - self.ds_epoch
        if since >= 0 and since % self.dataset_weight_epoch == 0:
            self.weights = self._weighed(epoch, classifier, split, leaves_out=since == 0)
        if self.weights is not None:
            self.share_kept = float((self.weights > 0).float().mean())  # a step would wait for a tensor
        return self.weights

    def _weighed(self, epoch, classifier, split, leaves_out):
        """The weights from the network's votes, [n]. With `leaves_out` it is first decided which images to leave out;
        otherwise those that are already left out stay so.
        """
        votes = self.num_noise_ds if leaves_out else self.num_noise_dataset_weight
        batch_size = default_batch_size(split.device, split.spec.shape, votes)
        frozen = freeze(classifier, split.device, self.recipe.precision, batch_size)
        smooth = Smooth(frozen, self.num_classes, self.recipe.noise_sd)
        if leaves_out:
            right = self._right_votes("left out", smooth, split, range(len(split)), self.num_noise_ds, epoch)
            chosen = sampling.kept(right, self.num_noise_ds, self.ds_threshold).nonzero()[0].tolist()
        else:
            chosen = self.weights.nonzero().flatten().tolist()
        if not chosen:
            raise RunError(
                f"after {self.ds_epoch} epochs no training image has a share {self.ds_threshold} of right votes: "
                "give a smaller --ds_threshold or a later --ds_epoch"
            )
        right = self._right_votes("weighed", smooth, split, chosen, self.num_noise_dataset_weight, epoch)
        weights = torch.zeros(len(split), dtype=torch.float64)
        weights[chosen] = torch.from_numpy(sampling.weights(right, self.num_noise_dataset_weight))
        frozen.forget_functions()  # a GPU's graphs have memory of their own
        return weights

    def _right_votes(self, purpose, smooth, split, indices, n, epoch):
        """How many of the ensemble's n votes are right on each of the N images, [N]; other draws for each purpose."""
        seed = (purpose, self.recipe.seed, epoch)
        labels, votes = poll(smooth, split, indices, n, seed, smooth.base_classifier.max_pass_size)  # whole passes
        return votes[np.arange(len(labels)), -1, labels]

    def state(self):
        """The weights of the training images."""
        return {} if self.weights is None else {"weights": self.weights}

    def restore(self, state):
        """See `state`."""
        self.weights = state.get("weights")

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        pace = self.pace_from_noise(epoch, classifier, images, labels, noises)
        if epoch > self.ds_epoch:
            noises = attack(unwrapped(classifier), images, labels, noises, self.attack_steps, self.epsilon)
        logits = noisy_logits(classifier, images, noises)  # [L, m, B, K]
        loss = ct_loss(logits, labels, pace, self.recipe.eps)
        kept = torch.full((), self.share_kept, device=images.device)
        return self.total_loss(classifier, loss, logits, images, noises, kept=kept)


if __name__ == "__main__":
    command.main(ACRWeakness, __doc__, lbdlast=1.6, num_noise_vec=4)
