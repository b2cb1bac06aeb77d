"""Train a multi-head network with circular teaching and stability training (Li et al., NeurIPS 2019).

python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.25 --num_heads 5 --lbdlast 1.2 --lbd 2
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from dataclasses import dataclass

from circular_teaching import ct_loss
from spacte.cli import non_negative_float
from spacte.model.noisy import noisy_logits
from spacte.train import command
from spacte.train.objective import Objective


@dataclass
class Stability(Objective):
    """L_ce on the clean images + L_cos + lbd * the soft cross-entropy between clean and noisy predictions."""

    lbd: float = 2.0

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        parser.add_argument("--lbd", type=non_negative_float, help="weight of the stability term")

    def run_suffix(self):
        """The weight of the stability term."""
        return f"-lbd-{self.lbd}"

    def fewest_images(self):
        """Two, for the clean images pass the network alone."""
        return 2

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        clean = classifier(images).float()  # [L, B, K]; a pass of its own: BatchNorm sees clean and noisy images apart
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        noisy = noisy_logits(classifier, images, noises)  # [L, m, B, K]
        pace = self.pace_from_logits(epoch, noisy, labels)
        loss = ct_loss(clean, noisy, labels, pace, self.recipe.eps, self.lbd)
        return self.total_loss(classifier, loss, noisy, images, noises, stability=loss.stability)


if __name__ == "__main__":
    command.main(Stability, __doc__, lbdlast=1.2, num_noise_vec=1)
