"""Train a multi-head network with circular teaching and MACER's radius loss (Zhai et al., ICLR 2020).

python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.25 --num_heads 5 --lbdlast 1.2 --lbd 12
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from dataclasses import dataclass

from circular_teaching import ct_loss
from spacte.cli import non_negative_float, positive_float
from spacte.model.noisy import noisy_logits
from spacte.train import command
from spacte.train.objective import Objective
from spacte.utils import UserError


@dataclass
class MACER(Objective):
    """cl + lbd * rl + L_cos on m noised copies of a whole batch; with `deferred`, lbd is 0 before the first drop of
    the learning rate.
    """

    lbd: float = 12.0
    beta: float = 16.0
    margin: float = 8.0
    deferred: bool = False

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        add = parser.add_argument
        add("--lbd", type=non_negative_float, help="weight of the radius loss")
        add("--beta", type=positive_float, help="inverse temperature of the soft radius")
        add("--margin", type=positive_float, help="the soft radius, in units of sigma/2, from which nothing is gained")
        add("--deferred", action="store_true", help="lbd is 0 before the first drop of the learning rate")

    def __post_init__(self):
        """UserError if there is no second class."""
        if self.num_classes < 2:
            raise UserError("MACER's radius needs at least 2 classes")

    def run_suffix(self):
        """The weight of the radius loss, and whether it comes later."""
        return f"-lbd-{self.lbd}" + "-deferred" * self.deferred

    def mini_batches(self):
        """The whole batch makes one step, of m * batch_size noisy images."""
        return 1

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        lbd = 0.0 if self.deferred and epoch <= self.recipe.lr_step_size else self.lbd
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        logits = noisy_logits(classifier, images, noises)  # [L, m, B, K]
        loss = ct_loss(
            logits, labels, self.pace(epoch), self.recipe.eps,
            self.recipe.noise_sd, lbd, self.beta, self.margin,
        )  # fmt: skip
        return self.total_loss(classifier, loss, logits, images, noises, cl=loss.cl, rl=loss.rl)


if __name__ == "__main__":
    command.main(MACER, __doc__, lbdlast=1.2, num_noise_vec=16, batch_size=64)
