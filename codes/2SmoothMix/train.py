"""Train a multi-head network with circular teaching on SmoothMix's mixed images (Jeong et al., NeurIPS 2021).

    python train.py --arch R110 --dataset CIFAR10 --noise_sd 0.5 --num_heads 5 --num_noise_vec 2 --lbdlast 1.0 \\
        --num_steps 4 --attack_alpha 1.0 --mix_step 1 --eta 5
"""

from circular_teaching import ct_loss
from smoothmix import attack
from spacte import training
from spacte.cli import non_negative_float, non_negative_int, positive_float, positive_int
from spacte.objective import Objective, named_parts, unwrapped
from spacte.utils import UserError


class SmoothMix(Objective):
    """L_ce on the clean side + L_cos + eta * warm * L_mix, with warm = min(1, epoch / warmup)."""

    name = "SmoothMix"

    @staticmethod
    def add_flags(parser):
        """The flags of this defence alone."""
        add = parser.add_argument
        add("--attack_alpha", type=positive_float, default=0.5, help="L2 length of an attack step")
        add("--num_steps", type=positive_int, default=4, help="attack steps")
        add("--mix_step", type=non_negative_int, default=0, help="the step before which the clean side is taken")
        add("--eta", type=non_negative_float, default=5.0, help="weight of the mixed loss")
        add("--maxnorm_s", type=non_negative_float, help="L2 bound on the clean side (attack_alpha * mix_step)")
        add("--maxnorm", type=non_negative_float, help="L2 bound on the adversary (none)")
        add("--warmup", type=positive_int, default=10, help="epochs over which eta and maxnorm_s grow")

    def __init__(self, args, num_classes):
        super().__init__(args, num_classes)
        if args.mix_step >= args.num_steps:
            raise UserError(f"mix_step is {args.mix_step}: it must lie in 0..{args.num_steps - 1}, below num_steps")
        self.maxnorm_s = args.attack_alpha * args.mix_step if args.maxnorm_s is None else args.maxnorm_s

    def __call__(self, classifier, images, labels, epoch):
        """The loss and its parts; see Objective."""
        args, warm = self.args, min(1.0, epoch / self.args.warmup)
        noises = self.draw_noises(images)  # [m, B, C, H, W]
        clean, adversary = attack(
            unwrapped(classifier), images, labels, noises,
            args.num_steps, args.mix_step, args.attack_alpha, self.maxnorm_s * warm, args.maxnorm,
        )  # fmt: skip
        loss = ct_loss(classifier, clean, adversary, noises, labels, self.threshold(epoch), args.eps)
        cos = self.cosine_loss(classifier)
        return loss.total + cos + args.eta * warm * loss.mix, named_parts(loss, cos=cos, mix=loss.mix)


if __name__ == "__main__":
    training.main(SmoothMix, __doc__, lbdlast=1.6)
