"""Train a multi-head network with circular teaching on Gaussian noise (Cohen et al., ICML 2019).

python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.25 --num_heads 5 --num_noise_vec 2 --lbdlast 1.2
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from circular_teaching import ct_loss
from spacte.model.noisy import noisy_logits
from spacte.train import command
from spacte.train.objective import Objective


class Gaussian(Objective):
    """L_ce + L_cos."""

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        logits = noisy_logits(classifier, images, noises)  # [L, m, B, K]
        loss = ct_loss(logits, labels, self.pace(epoch), self.recipe.eps)
        return self.total_loss(classifier, loss, logits, images, noises)


if __name__ == "__main__":
    command.main(Gaussian, __doc__, lbdlast=1.2)
