"""Denoised smoothing: a denoiser in front of a classifier that never saw noise. A worked example of --classifier.

cd codes/0Gaussian
python train.py --dataset digits --arch R8 --num_heads 1 --noise_sd 0.01 --epochs 20 --lr_step_size 8
python ../examples/denoised.py --dataset digits --noise_sd 0.5 --output denoiser.pth
python certify_mhead.py --classifier ../examples/denoised.py:build --classifier_args denoiser=denoiser.pth \\
    classifier=save/digits/R8/noise-0.01/h-1-m-2/epoch20.pth \\
    --dataset digits --noise_sd 0.5 --N 1000

The denoiser learns to take the noise of one sigma away (mean squared error), and is certified together with the
classifier behind it as one network. Copy this file and put your own two into `build`: a diffusion model's single
denoising step is one more denoiser (Carlini et al., ICLR 2023). Source: Salman et al. (NeurIPS 2020), section 3.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import io
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spacte import cli, load_classifier, open_split
from spacte.data.spec import DATASETS
from spacte.device import select_device
from spacte.files import make_folder, replace_file
from spacte.utils import UserError


class Denoiser(nn.Module):
    """Noisy images [N, C, H, W] -> images of the same shape: what five convolutions take for noise is subtracted.

    Source: DnCNN (Zhang et al., IEEE TIP 2017), without its BatchNorm.
    """

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        sizes = (channels, width, width, width, width, channels)
        convolutions = [nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(sizes)]
        self.noise = nn.Sequential(convolutions[0], *(part for one in convolutions[1:] for part in (nn.ReLU(), one)))

    def forward(self, noisy: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return noisy - self.noise(noisy)


def build(denoiser: str, classifier: str) -> nn.Module:
    """What --classifier certifies: the denoiser of a file that `main` wrote, then the classifier of a checkpoint."""
    state = torch.load(denoiser, map_location="cpu", weights_only=True)
    front = Denoiser(channels=state["noise.0.weight"].shape[1], width=state["noise.0.weight"].shape[0])
    front.load_state_dict(state)
    return nn.Sequential(front, load_classifier(classifier).classifier)


def train(split, noise_sd: float, epochs: int, batch_size: int, seed: int) -> Denoiser:
    """A denoiser for noise N(0, noise_sd^2 I) on the split's images, after that many passes over them."""
    torch.manual_seed(seed)
    denoiser, order = Denoiser(split.spec.shape[0]).to(split.device), torch.Generator().manual_seed(seed)
    steps = epochs * split.num_batches(batch_size)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(1, epochs + 1):
        for images, _ in split.batches(batch_size, order):
            loss = F.mse_loss(denoiser(images + noise_sd * torch.randn_like(images)), images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 0 or epoch == epochs:
            print(f"epoch {epoch}/{epochs}  mean squared error {loss.item():.4f}, of the noise {noise_sd**2:.4f}")
    return denoiser


def main() -> None:
    """Train a denoiser and leave its weights."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help=f"one of {', '.join(DATASETS)}")
    add("--data_dir", default="./data", help="where the data set's files are, or are downloaded to")
    add("--noise_sd", required=True, type=cli.positive_float, help="sigma, in units of [0, 1]")
    add("--epochs", default=40, type=cli.positive_int, help="passes over the training images")
    add("--batch_size", default=64, type=cli.positive_int, help="images per step")
    add("--seed", default=0, type=cli.seed, help="of the weights, the noise and the order")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--output", default="denoiser.pth", type=Path, help="file of the weights")
    args = parser.parse_args()
    if args.output.is_dir():
        raise UserError(f"--output '{args.output}' is a folder: give the name of a file")
    split = open_split(args.dataset, args.data_dir, train=True, device=select_device(args.device))
    make_folder(args.output.absolute().parent)
    denoiser = train(split, args.noise_sd, args.epochs, args.batch_size, args.seed)
    weights = io.BytesIO()
    torch.save({name: value.cpu() for name, value in denoiser.state_dict().items()}, weights)
    replace_file(args.output, weights.getbuffer())
    print(f"denoiser: {args.output}")


if __name__ == "__main__":
    cli.run(main)
