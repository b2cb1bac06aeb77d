"""Train a multi-head network with circular teaching and consistency regularisation (Jeong and Shin, NeurIPS 2020).

python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.25 --num_heads 5 --num_noise_vec 2 --lbdlast 1.0 --lbd 20
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
class Consistency(Objective):
    """L_ce + L_cos + L_con."""

    lbd: float = 20.0
    eta: float = 0.5
    mean_grad: str = "auto"

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        parser.add_argument("--lbd", type=non_negative_float, help="weight of the KL term")
        parser.add_argument("--eta", type=non_negative_float, help="weight of the entropy term")
        parser.add_argument(
            "--mean_grad",
            choices=("auto", "yes", "no"),
            help="gradient through the mean prediction; auto: no for several heads, as in the paper's code, "
            "and yes for one, as in Jeong and Shin's",
        )

    def run_suffix(self):
        """The weight of the KL term, as in the authors' names."""
        return f"-lbd-{self.lbd}"

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        logits = noisy_logits(classifier, images, noises)  # [L, m, B, K]
        mean_grad = {"auto": None, "yes": True, "no": False}[self.mean_grad]
        loss = ct_loss(logits, labels, self.pace(epoch), self.recipe.eps, self.lbd, self.eta, mean_grad)
        return self.total_loss(classifier, loss, logits, images, noises, con=loss.consistency)


if __name__ == "__main__":
    command.main(Consistency, __doc__, lbdlast=1.0)
