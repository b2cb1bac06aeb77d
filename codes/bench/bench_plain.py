"""The authors' way, against which bench.py and bench_table.py measure ours: what their code does, in its manner.

Eager float32 with torch's own settings, contiguous tensors, votes counted one by one on the host, Python loops over
heads, noise vectors and pairs of heads.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TORCHS_OWN = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True)


@torch.no_grad()
@_TORCHS_OWN
def plain_votes(
    classifier: nn.Module, image: Tensor, sigma: float, batch_size: int, num_classes: int
) -> np.ndarray:  # fmt: skip
    """The ensemble's votes [K] on one batch of noisy copies of an image [C, H, W], as the authors' code counts them."""
    batch = image.repeat((batch_size, 1, 1, 1))
    logits = classifier(batch + torch.randn_like(batch) * sigma)
    counts = np.zeros(num_classes, dtype=int)
    for vote in logits.sum(0).argmax(1).cpu().numpy():
        counts[vote] += 1
    return counts


@_TORCHS_OWN
def plain_step(
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    sigma: float,
    noises: int,
    threshold: float,
) -> list[float]:
    """A training step of the Gaussian base at the pace `threshold`, lambda; returns the total and each head's loss."""
    repeated = images.repeat(noises, 1, 1, 1)
    logits = classifier(repeated + torch.randn_like(repeated) * sigma)
    losses = []
    for head in logits:
        each = [F.cross_entropy(z, labels, reduction="none") for z in head.chunk(noises)]
        losses.append(sum(each) / noises)
    heads = []
    for h, loss in enumerate(losses):
        teacher, own = losses[h - 1].detach(), loss.detach()
        hard = (1 + np.exp(-threshold)) / (1 + torch.exp(own - threshold))
        heads.append((torch.where(teacher <= threshold, torch.ones_like(hard), hard) * loss).mean())
    total = sum(heads) / len(heads)
    thetas = [torch.cat([p.view(-1) for p in head.parameters()]) for head in classifier[1].heads]
    for h in range(len(thetas)):
        for g in range(h + 1, len(thetas)):
            total = total + F.cosine_similarity(thetas[h], thetas[g], dim=0) ** 2
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return [total.item(), *(head.item() for head in heads)]
