"""Diffusion denoised smoothing: one step of a diffusion model takes the noise away, then a classifier decides.

cd codes/0Gaussian
python train.py --dataset digits --arch R8 --num_heads 1 --noise_sd 0.01 --epochs 20 --lr_step_size 8
python ../examples/diffusion_denoised.py --dataset digits --output diffusion
python certify_mhead.py --classifier ../examples/diffusion_denoised.py:build \\
    --classifier_args diffusion=diffusion noise_sd=0.5 \\
    classifier=save/digits/R8/noise-0.01/h-1-m-2/epoch20.pth \\
    --dataset digits --noise_sd 0.5 --N 1000

`diffusion` is a folder that diffusers' UNet2DModel and a scheduler of noise predictions save to: a published one
works, too, with images of its size. The diffusion model was trained on 2x - 1 in [-1, 1], where the noise of sigma on
[0, 1] is 2 sigma. Its state at time t is sqrt(abar_t) (2x - 1) + sqrt(1 - abar_t) e: a noisy image scaled by
sqrt(abar_t) is that where (1 - abar_t) / abar_t = (2 sigma)^2. No noise is added, so that the whole is a function.
Source: Carlini et al. (ICLR 2023), algorithm 1.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from spacte import cli, load_classifier, open_split
from spacte.data.spec import DATASETS
from spacte.device import select_device
from spacte.files import make_folder
from spacte.utils import UserError


class OneStep(nn.Module):
    """Noisy images x + sigma e [N, C, H, W] -> what the diffusion model takes them to be without noise, in [0, 1]."""

    def __init__(self, unet: UNet2DModel, alphas_cumprod: Tensor, sigma: float):
        super().__init__()
        ratios = (1 - alphas_cumprod) / alphas_cumprod  # grows with t
        self.time = int(torch.searchsorted(ratios, torch.tensor((2 * sigma) ** 2)).clamp(max=len(ratios) - 1))
        if float(ratios[-1]) < (2 * sigma) ** 2:
            raise UserError(f"the diffusion model ends at noise {float(ratios[-1].sqrt()) / 2:.3g}: sigma is {sigma:g}")
        self.unet, self.abar = unet, float(alphas_cumprod[self.time])

    def forward(self, noisy: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        state = self.abar**0.5 * (2 * noisy - 1)
        noise = self.unet(state, self.time).sample
        clean = (state - (1 - self.abar) ** 0.5 * noise) / self.abar**0.5
        return (clean.clamp(-1, 1) + 1) / 2


def build(diffusion: str, classifier: str, noise_sd: float) -> nn.Module:
    """What --classifier certifies: the diffusion model's one step for noise_sd, then the classifier of a checkpoint."""
    unet = UNet2DModel.from_pretrained(diffusion, local_files_only=True)
    scheduler = DDPMScheduler.from_pretrained(diffusion, local_files_only=True)
    if scheduler.config.prediction_type != "epsilon":
        raise UserError(f"'{diffusion}' predicts {scheduler.config.prediction_type}: it must be epsilon, the noise")
    return nn.Sequential(OneStep(unet, scheduler.alphas_cumprod, noise_sd), load_classifier(classifier).classifier)


def train(split, epochs: int, batch_size: int, seed: int) -> tuple[UNet2DModel, DDPMScheduler]:
    """A small diffusion model of the split's images after that many passes over them."""
    torch.manual_seed(seed)
    channels, size, _ = split.spec.shape
    unet = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(32, 64), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).to(split.device)  # fmt: skip
    scheduler, order = DDPMScheduler(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * split.num_batches(batch_size))
    for epoch in range(1, epochs + 1):
        for images, _ in split.batches(batch_size, order):
            noise = torch.randn_like(images)
            times = torch.randint(len(scheduler.betas), (len(images),), device=images.device)
            loss = F.mse_loss(unet(scheduler.add_noise(2 * images - 1, noise, times), times).sample, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 0 or epoch == epochs:
            print(f"epoch {epoch}/{epochs}  mean squared error of the noise {loss.item():.3f}, of guessing 0: 1")
    return unet, scheduler


def main() -> None:
    """Train a diffusion model and leave it in a folder."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help=f"one of {', '.join(DATASETS)}")
    add("--data_dir", default="./data", help="where the data set's files are, or are downloaded to")
    add("--epochs", default=60, type=cli.positive_int, help="passes over the training images")
    add("--batch_size", default=64, type=cli.positive_int, help="images per step")
    add("--seed", default=0, type=cli.seed, help="of the weights, the noise and the order")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--output", default="diffusion", type=Path, help="folder of the model")
    args = parser.parse_args()
    split = open_split(args.dataset, args.data_dir, train=True, device=select_device(args.device))
    make_folder(args.output.absolute())
    for part in train(split, args.epochs, args.batch_size, args.seed):
        part.save_pretrained(args.output)
    print(f"diffusion model: {args.output}")


if __name__ == "__main__":
    cli.run(main)
