"""Train a multi-head network with circular teaching on SmoothAdv's adversarial images (Salman et al., NeurIPS 2019).

    python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.5 --num_heads 5 --num_noise_vec 8 --lbdlast 1.6 \\
        --epsilon 1.0 --num_steps 10
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from dataclasses import dataclass

from circular_teaching import ct_loss
from smoothadv import attack
from spacte.cli import image_norm, positive_int
from spacte.model.noisy import noisy_logits
from spacte.train import command
from spacte.train.objective import Objective, unwrapped


@dataclass
class SmoothAdv(Objective):
    """L_ce on adversarial images within epsilon * min(1, epoch / warmup) + L_cos."""

    epsilon: float = 1.0
    num_steps: int = 10
    warmup: int = 10

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        add = parser.add_argument
        add("--epsilon", type=image_norm, help="L2 bound on the attack, in units of [0, 1]; the authors' 256 is 1")
        add("--num_steps", type=positive_int, help="attack steps, of length 2 epsilon / num_steps")
        add("--warmup", type=positive_int, help="epochs over which epsilon grows")

    def run_suffix(self):
        """The attack's bound and steps."""
        return f"-epsilon-{self.epsilon}-steps-{self.num_steps}"

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        epsilon = self.epsilon * min(1.0, epoch / self.warmup)
        adversary = attack(unwrapped(classifier), images, labels, noises, self.num_steps, epsilon)
        logits = noisy_logits(classifier, adversary, noises)  # [L, m, B, K]
        pace = self.pace_from_noise(epoch, classifier, images, labels, noises)
        loss = ct_loss(logits, labels, pace, self.recipe.eps)
        return self.total_loss(classifier, loss, logits, adversary, noises)


if __name__ == "__main__":
    command.main(SmoothAdv, __doc__, lbdlast=1.6, num_noise_vec=4)
