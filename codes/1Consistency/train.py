"""Train a multi-head network with circular teaching and consistency regularisation (Jeong and Shin, NeurIPS 2020).

python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.25 --num_heads 5 --num_noise_vec 2 --lbdlast 1.0 --lbd 20
"""

from circular_teaching import ct_loss
from spacte import training
from spacte.cli import non_negative_float
from spacte.objective import Objective, named_parts
from spacte.teaching import noisy_logits


class Consistency(Objective):
    """L_ce + L_cos + L_con."""

    name = "Consistency"

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        parser.add_argument("--lbd", type=non_negative_float, default=20.0, help="weight of the KL term")
        parser.add_argument("--eta", type=non_negative_float, default=0.5, help="weight of the entropy term")
        parser.add_argument(
            "--mean_grad",
            choices=("auto", "yes", "no"),
            default="auto",
            help="gradient through the mean prediction; auto: no for several heads, as in the paper's code, "
            "and yes for one, as in Jeong and Shin's",
        )

    @staticmethod
    def run_suffix(args):
        """The weight of the KL term, as in the authors' names."""
        return f"-lbd-{args.lbd}"

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        logits = noisy_logits(classifier, images, noises)  # [L, m, B, K]
        mean_grad = {"auto": None, "yes": True, "no": False}[self.args.mean_grad]
        threshold = self.threshold(epoch)
        loss = ct_loss(logits, labels, threshold, self.args.eps, self.args.lbd, self.args.eta, mean_grad)
        cos = self.cosine_loss(classifier)
        return loss.total + cos, named_parts(loss, cos=cos, con=loss.consistency)


if __name__ == "__main__":
    training.main(Consistency, __doc__, lbdlast=1.0)
