"""Train a multi-head network with circular teaching and confidence-aware training (Jeong et al., AAAI 2023).

It needs a network that 0Gaussian has trained, in the paper with sigma 0.25 and one head, whatever the sigma here:

    python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.5 --num_heads 5 --lbdlast 1.6 --lbd 1 \\
        --pretrained_model ../0Gaussian/save/CIFAR10/R110/noise-0.25/h-1-m-2/epoch150.pth
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from catrs import attack
from circular_teaching import ct_loss
from soft_votes import soft_votes
from spacte.cli import image_norm, non_negative_float, positive_int
from spacte.files import sha256
from spacte.model.noisy import noisy_logits
from spacte.train import command
from spacte.train.objective import Objective, unwrapped
from spacte.utils import UserError

_FEWEST_VOTES = 100


@dataclass
class CATRS(Objective):
    """low + lbd * high + L_cos: easy noise where the network is not sure of an image, the worst noise where it is."""

    inputs: ClassVar = ("pretrained_model",)
    places: ClassVar = ("votes_dir",)

    pretrained_model: str | None = None
    num_votes: int = 10_000
    votes_dir: str = "./votes"
    epsilon: float = 1.0
    num_steps: int = 4
    lbd: float = 0.5
    confidence_mask: bool = False

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        add = parser.add_argument
        add("--pretrained_model", help="checkpoint of 0Gaussian: its votes on the training images are the soft labels")
        add("--num_votes", type=positive_int, help=f"its votes per image, at least {_FEWEST_VOTES}")
        add("--votes_dir", help="the votes: <votes_dir>/<dataset>/<arch>/noise-<sd>/votes/; runs share them")
        add("--epsilon", type=image_norm, help="L2 bound on the attack, in units of [0, 1]; the authors' 256 is 1")
        add("--num_steps", type=positive_int, help="attack steps, of length 2 epsilon / num_steps")
        add("--lbd", type=non_negative_float, help="weight of the loss on adversarial noise")
        confidence = "an image's confidence comes from the pretrained network's votes, not the head's own"
        add("--confidence_mask", action="store_true", help=confidence)

    def __post_init__(self):
        """UserError if the votes are too few."""
        if self.num_votes < _FEWEST_VOTES:
            raise UserError(f"--num_votes {self.num_votes}: soft votes need at least {_FEWEST_VOTES}")

    def run_suffix(self):
        """The attack, the weight of its loss, and who is asked for the confidence."""
        attack = f"-epsilon-{self.epsilon}-steps-{self.num_steps}"
        return f"{attack}-lbd-{self.lbd}" + "-confidence-mask" * self.confidence_mask

    def targets(self, split):
        """The pretrained network's soft votes on the training images, [n, K]."""
        if self.pretrained_model is None:
            raise UserError("CAT-RS needs --pretrained_model: a checkpoint of 0Gaussian, in the paper of sigma 0.25")
        votes = soft_votes(self.pretrained_model, self.num_votes, self.votes_dir, split, self.recipe)
        return votes.to(split.device)

    def restore(self, state):
        """UserError if an older version's run, whose network's hash is here, began with another one."""
        path, began_with = Path(self.pretrained_model or ""), state.get("votes_of")
        if began_with and path.is_file() and sha256(path) != began_with:
            raise UserError(f"--pretrained_model '{path}' is not the network that the run began with")

    def __call__(self, classifier, images, labels, epoch, soft_votes):
        """The loss and its parts; see Objective. `soft_votes` [B, K] are the rows of `targets`."""
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        logits = noisy_logits(classifier, images, noises)  # [L, m, B, K]
        adversarial_noises = attack(unwrapped(classifier), images, noises, soft_votes, self.num_steps, self.epsilon)
        loss = ct_loss(
            logits, noisy_logits(classifier, images, adversarial_noises), labels, soft_votes,
            self.pace(epoch), self.recipe.eps, self.lbd, self.confidence_mask,
        )  # fmt: skip
        own = {"low": loss.low, "high": loss.high, "mask": loss.mask}
        return self.total_loss(classifier, loss, logits, images, noises, **own)


if __name__ == "__main__":
    command.main(CATRS, __doc__, lbdlast=1.6, num_noise_vec=4)
