"""The field's checkpoints give their own logits here; which normalisation they were trained with is read off data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock

from spacte.data.sources import open_split
from spacte.data.spec import data_spec
from spacte.model import build_network
from spacte.model.checkpoint import load_classifier
from spacte.model.heads import make_stage
from spacte.model.normalisation import NORMALISATIONS, normalisation, recognise_normalisation
from spacte.utils import UserError

CPU = torch.device("cpu")


class CifarResNet(nn.Module):
    """With the keys of Cohen's archs/cifar_resnet.py: conv1, bn1, layer1 to layer3, fc."""

    def __init__(self, depth, classes=10):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = make_stage(BasicBlock, 16, 16, blocks, 1)
        self.layer2 = make_stage(BasicBlock, 16, 32, blocks, 2)
        self.layer3 = make_stage(BasicBlock, 32, 64, blocks, 2)
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def shaken(network):
    """With statistics, scales and shifts that are not those of a fresh layer."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.weight.data, 0.5, 1), (module.running_var, 0.5, 1.5)):
                values.uniform_(low, high)
            for values in (module.bias.data, module.running_mean):
                values.normal_(0, 0.1)
    return network.eval()


def saved(path, network, layout):
    """A file as the field writes it; the networks after a normalisation are the second of two layers."""
    path.parent.mkdir()
    if layout == "macer":
        torch.save({"net": network.state_dict(), "epoch": 440}, path)
        return path
    if layout == "bare":
        torch.save(network.state_dict(), path)
        return path
    behind = nn.Sequential(nn.Identity(), nn.DataParallel(network) if layout == "imagenet" else network)
    optimizer = torch.optim.SGD(behind.parameters(), lr=0.1, momentum=0.9)
    state = behind.state_dict()
    if layout == "old":
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    contents = {"epoch": 90, "arch": "resnet50", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(contents, path, _use_new_zipfile_serialization=layout == "zip")
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "layout", "dataset", "arch"),
    [
        (lambda: CifarResNet(110), "legacy", "CIFAR10", "R110"),
        (lambda: CifarResNet(20), "old", "CIFAR10", "R20"),
        (lambda: CifarResNet(20, 100), "zip", "CIFAR100", "R20"),
        (lambda: CifarResNet(20), "macer", "SVHN", "R20"),
        (lambda: resnet50(weights=None), "imagenet", "ImageNet", "R50"),
        (lambda: resnet18(weights=None), "bare", "ImageNet", "R18"),
    ],
    ids=["legacy", "old", "zip", "macer", "imagenet", "bare"],
)
def test_a_published_checkpoint_gives_its_own_logits(tmp_path, make, layout, dataset, arch):
    network, spec, images = shaken(make()), data_spec(dataset), torch.rand(2, 3, 64, 64)
    path = saved(tmp_path / "noise_0.25" / "checkpoint.pth.tar", network, layout)
    for kind in NORMALISATIONS if layout == "old" else ("mean_std",):
        loaded = load_classifier(path, dataset=dataset, noise_sd=0.25, normalize=kind)
        assert (loaded.settings["arch"], loaded.settings["num_heads"]) == (arch, 1)
        assert loaded.published and loaded.normalize == kind and loaded.run == "noise_0.25"
        expected = network(normalisation(kind, spec)(images))
        torch.testing.assert_close(loaded.classifier(images)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_published_checkpoint_runs_only_after_a_layer_that_was_named(tmp_path):
    path = saved(tmp_path / "a" / "checkpoint.pth.tar", CifarResNet(8), "zip")
    loaded = load_classifier(path, "R8", "CIFAR10")
    assert loaded.normalize is None
    with pytest.raises(UserError, match="does not say its normalisation: give one of mean_std, centre, none"):
        loaded.classifier(torch.rand(2, 3, 32, 32))
    assert loaded.normalised_by("none").classifier(torch.rand(2, 3, 32, 32)).shape == (1, 2, 10)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.fc1 = nn.Conv2d(1, 20, 5), nn.Linear(20, 10)


@pytest.mark.parametrize(
    ("network", "given", "message"),
    [
        (LeNet(), {}, r"is not a network that is known here; there are multi-head .*R8, .*R152.*--classifier FILE"),
        (CifarResNet(26), {}, "is not a network that is known here"),
        (CifarResNet(8, 1000), {}, r"\(1000, 64\) there and \(10, 64\) here \(wrong classes"),
        (CifarResNet(8), {"arch": "cifar_resnet110"}, "--arch R110 contradicts checkpoint .* has arch R8"),
        (CifarResNet(8), {"num_heads": 5}, "--num_heads 5 contradicts"),
        (CifarResNet(8), {"dataset": None}, "does not say its dataset: give --dataset"),
        (CifarResNet(8), {"dataset": "ImageFolder"}, "does not say its mean and deviation"),
        (CifarResNet(8), {"normalize": "std"}, "unknown normalisation 'std': choose from auto, mean_std, centre, none"),
    ],
)
def test_what_is_not_known_is_one_line(tmp_path, network, given, message):
    path = saved(tmp_path / "a" / "checkpoint.pth.tar", network, "zip")
    with pytest.raises(UserError, match=message):
        load_classifier(path, **{"dataset": "CIFAR10"} | given)


def test_our_own_checkpoint_was_trained_with_mean_std(digits_models):
    assert load_classifier(digits_models[1], normalize="mean_std").normalize == "mean_std"
    with pytest.raises(UserError, match=r"--normalize none contradicts checkpoint .* with mean_std"):
        load_classifier(digits_models[1], normalize="none")


# --- which normalisation ---

SIGMA = 0.5


def trained_with(kind, epochs):
    """A network after a few epochs on noised digits; so small that it learns little, but BatchNorm sees much."""
    split, layer = open_split("digits", ".", True, CPU), normalisation(kind, data_spec("digits"))
    network = build_network("R8", 1, 10, 1)
    optimizer, order = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9), torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for images, labels in split.batches(128, order):
            logits = network(layer(images + SIGMA * torch.randn_like(images)))[0]
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def noised():
    split = open_split("digits", ".", False, CPU)
    images = torch.stack([split[idx][0] for idx in range(len(split))])
    return images + SIGMA * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_the_normalisation_is_read_off_the_data(noised, kind):
    network = trained_with(kind, 5)
    found, how_clearly = recognise_normalisation(network, data_spec("digits"), noised)
    assert found == kind and f"--normalize auto takes {kind}: bn1's statistics lie 0.0" in how_clearly


def test_there_is_no_guess_where_the_data_do_not_tell(noised):
    spec, untrained = data_spec("digits"), trained_with("centre", 0)
    for network in (untrained, trained_with("centre", 1)):
        with pytest.raises(UserError, match=r"cannot tell: bn1 has seen only \d+ batches .* mean_std, centre or none"):
            recognise_normalisation(network, spec, noised)
    untrained.bn1.running_mean.fill_(3.0)  # a file without the number of batches, trained on something else
    with pytest.raises(UserError, match=r"cannot tell: .* nats from those after \w+, .* after \w+"):
        recognise_normalisation(untrained, spec, noised)
    blind = trained_with("centre", 4)  # to the images' mean: after centre and none it is the same network
    blind.conv1.weight.data -= blind.conv1.weight.data.mean((2, 3), keepdim=True)
    with torch.no_grad():
        outputs = blind.conv1(normalisation("centre", spec)(noised))[..., 1:-1, 1:-1]
    blind.bn1.running_mean, blind.bn1.running_var = outputs.mean((0, 2, 3)), outputs.var((0, 2, 3))
    with pytest.raises(UserError, match="cannot tell"):
        recognise_normalisation(blind, spec, noised)
