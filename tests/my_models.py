"""Functions that build classifiers, as a user writes them: some keep the contract, others break it in one way each."""

import torch
from torch import nn
from torch import relu as builtin  # noqa: F401


def net(width=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width))


def build(scale=1.0, name="x"):
    network = net()
    network[1].weight.data *= scale
    return network


def three():
    network = net(30)
    return lambda images: network(images).view(-1, 3, 10).transpose(0, 1)


def no_gradient():
    network = net()
    return lambda images: network(images.detach())


def random():
    network = net()
    return lambda images: nn.functional.dropout(network(images), 0.3)


def train_mode():
    network = nn.Sequential(nn.BatchNorm2d(1), net()).train()
    return lambda images: network(images)


def company():
    network = net()
    return lambda images: network(images - images.mean())


def probabilities():
    logits = three()
    return lambda images: logits(images).softmax(-1)


def classes():
    network = net()
    return lambda images: network(images).argmax(-1)


def no_tensor():
    network = net()
    return lambda images: {"logits": network(images)}


def not_finite():
    network = net()
    return lambda images: network(images).log()


def too_few():
    return net(7)


def other_images():
    return nn.Linear(3, 10)


def one_image():
    network = net()
    return lambda images: network(images)[:1]


def nothing():
    pass


def ends():
    raise SystemExit(2)


def settings(old="", new="", benchmark=False):
    network = net()

    def classifier(images):
        if old:
            torch.set_float32_matmul_precision(old)
        if new:
            name, value = new.split()
            getattr(torch.backends, name).conv.fp32_precision = value
        torch.backends.cudnn.benchmark = benchmark
        return network(images)

    return classifier


def general():
    torch.backends.fp32_precision = "tf32"
    return net()


def old_name():
    torch.backends.cuda.matmul.allow_tf32 = True
    return net()


def new_name():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    return net()


def missing():
    return torch.load("weights.pth")
