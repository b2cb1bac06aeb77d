"""Train a multi-head network with circular teaching on SmoothMix's mixed images (Jeong et al., NeurIPS 2021).

    python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.5 --num_heads 5 --num_noise_vec 2 --lbdlast 1.0 \\
        --num_steps 4 --attack_alpha 1.0 --mix_step 1 --eta 5
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from dataclasses import dataclass

from circular_teaching import ct_loss
from smoothmix import attack
from spacte.cli import non_negative_float, non_negative_int, positive_float, positive_int
from spacte.train import command
from spacte.train.objective import Objective, unwrapped
from spacte.utils import UserError


@dataclass
class SmoothMix(Objective):
    """L_ce on the clean side + L_cos + eta * warm * L_mix, with warm = min(1, epoch / warmup)."""

    attack_alpha: float = 0.5
    num_steps: int = 4
    mix_step: int = 0
    eta: float = 5.0
    maxnorm_s: float | None = None
    maxnorm: float | None = None
    warmup: int = 10

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        add = parser.add_argument
        add("--attack_alpha", type=positive_float, help="L2 length of an attack step")
        add("--num_steps", type=positive_int, help="attack steps")
        add("--mix_step", type=non_negative_int, help="attack steps before the clean side is taken; 0: the image")
        add("--eta", type=non_negative_float, help="weight of the mixed loss")
        add("--maxnorm_s", type=non_negative_float, help="L2 bound on the clean side (attack_alpha * mix_step)")
        add("--maxnorm", type=non_negative_float, help="L2 bound on the adversary (none)")
        add("--warmup", type=positive_int, help="epochs over which eta and maxnorm_s grow")

    def __post_init__(self):
        """UserError if the clean side would be taken after the last step."""
        if self.mix_step >= self.num_steps:
            raise UserError(f"mix_step is {self.mix_step}: it must lie in 0..{self.num_steps - 1}, below num_steps")

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        warm = min(1.0, epoch / self.warmup)
        maxnorm_s = self.attack_alpha * self.mix_step if self.maxnorm_s is None else self.maxnorm_s
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        clean, adversary = attack(
            unwrapped(classifier), images, labels, noises,
            self.num_steps, self.mix_step, self.attack_alpha, maxnorm_s * warm, self.maxnorm,
        )  # fmt: skip
        pace = self.pace_from_noise(epoch, classifier, images, labels, noises)
        loss = ct_loss(classifier, clean, adversary, noises, labels, pace, self.recipe.eps)
        total, parts = self.total_loss(classifier, loss, loss.logits, clean, noises, mix=loss.mix)
        return total + self.eta * warm * loss.mix, parts


if __name__ == "__main__":
    command.main(SmoothMix, __doc__, lbdlast=1.6)
