"""Published checkpoints give their own logits here, whatever wraps them; what is none is told so."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet50, wide_resnet50_2
from torchvision.models.resnet import BasicBlock

from spacte.data.spec import DataSpec, data_spec
from spacte.model import build_classifier
from spacte.model.checkpoint import load_classifier
from spacte.model.heads import make_stage
from spacte.model.normalisation import NORMALISATIONS, normalisation
from spacte.model.recognition import check_normalisation
from spacte.utils import UserError


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
    """A published file; the networks after a normalisation are the second of two layers."""
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
        assert (loaded.arch, loaded.num_heads) == (arch, 1)
        assert loaded.published and loaded.normalize == kind and loaded.run == "noise_0.25"
        expected = network(normalisation(kind, spec)(images))
        torch.testing.assert_close(loaded.classifier(images)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_published_checkpoint_runs_only_after_a_layer_that_was_named(tmp_path):
    path = saved(tmp_path / "a" / "checkpoint.pth.tar", CifarResNet(8), "zip")
    loaded = load_classifier(path, "R8", "CIFAR10")
    assert loaded.normalize is None
    with pytest.raises(UserError, match="does not say its normalisation: give mean_std, centre, none or constants"):
        loaded.classifier(torch.rand(2, 3, 32, 32))
    assert loaded.normalised_by("none").classifier(torch.rand(2, 3, 32, 32)).shape == (1, 2, 10)


class LeNet(nn.Module):
    """With the keys and sizes of the papers on smoothing."""

    def __init__(self, channels=(20, 50)):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, channels[0], 5), nn.Conv2d(channels[0], channels[1], 5)
        self.fc1, self.fc2 = nn.Linear(16 * channels[1], 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["zip", "macer"])
def test_lenet_gives_its_own_logits(tmp_path, layout):
    """It has no BatchNorm to ask, and is trained without a normalisation."""
    network, images = LeNet(), torch.rand(3, 1, 28, 28)
    path = saved(tmp_path / "a" / "checkpoint.pth.tar", network, layout)
    loaded = load_classifier(path, "lenet", "MNIST", noise_sd=0.5, normalize="none")
    assert loaded.arch == "LeNet"
    torch.testing.assert_close(loaded.classifier(images)[0], network(images), rtol=1e-5, atol=1e-5)
    unnamed = load_classifier(path, dataset="MNIST").classifier[1]
    name, line = check_normalisation(unnamed, None, data_spec("MNIST"), images, 0.5)
    assert name == "none" and "no BatchNorm to ask" in line
    with pytest.raises(UserError, match=r"LeNet needs images of 28x28 pixels, those of CIFAR10 are 32x32"):
        build_classifier("LeNet", "CIFAR10", 2)


def test_lenet_trains_with_several_heads():
    classifier = build_classifier("LeNet", "MNIST", 3)
    logits = classifier(torch.rand(4, 1, 28, 28))
    assert logits.shape == (3, 4, 10) and not torch.equal(logits[0], logits[1])


WRAPPED = {
    "compiled": lambda state: {"state_dict": {f"_orig_mod.1.{key}": value for key, value in state.items()}},
    "compiled inside": lambda state: {"state_dict": {f"1._orig_mod.{key}": value for key, value in state.items()}},
    "parallel, compiled": lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "lightning": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3},
    "nested": lambda state: {"model_state_dict": {f"module.net.backbone.{key}": v for key, v in state.items()}},
    "container in container": lambda state: {"model": {"state_dict": state}},
    "exponential average": lambda state: {
        "ema": {f"module.{k}": v for k, v in state.items()} | {"n_averaged": torch.tensor(3)}
    },
    "with numpy's scores": lambda state: {"state_dict": state, "best_acc": np.float64(0.9), "curve": np.ones(3)},
    "with flags and a path": lambda state: {"net": state, "args": Namespace(lr=0.1, out=Path("x")), "f": np.float32(1)},
}


@torch.no_grad()
@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_and_containers_are_taken_off(tmp_path, how):
    network, images = shaken(CifarResNet(8)), torch.rand(2, 3, 32, 32)
    torch.save(WRAPPED[how](network.state_dict()), tmp_path / "a.pth")
    loaded = load_classifier(tmp_path / "a.pth", dataset="CIFAR10", noise_sd=0.25, normalize="none")
    torch.testing.assert_close(loaded.classifier(images)[0], network(images), rtol=1e-5, atol=1e-5)


def test_of_two_networks_in_a_file_the_user_is_told_which_is_taken(tmp_path):
    state, other = CifarResNet(8).state_dict(), CifarResNet(8).state_dict()
    torch.save({"model": state, "ema": other, "args": ["--lr", 0.1]}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="holds networks under model and ema: the first is taken"):
        loaded = load_classifier(tmp_path / "a.pth", dataset="CIFAR10", normalize="none")
    assert torch.equal(loaded.classifier[1].conv1.weight, state["conv1.weight"])


@torch.no_grad()
def test_a_normalisation_in_the_file_is_taken(tmp_path):
    network, images = shaken(CifarResNet(8)), torch.rand(2, 3, 32, 32)
    layer = {"0.mean": torch.full((3, 1, 1), 0.5), "0.std": torch.full((3, 1, 1), 0.25)}
    state = layer | {f"1.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    loaded = load_classifier(tmp_path / "a.pth", dataset="CIFAR10", noise_sd=0.25)
    assert loaded.normalize == "0.5,0.5,0.5/0.25,0.25,0.25"
    torch.testing.assert_close(loaded.classifier(images)[0], network((images - 0.5) / 0.25), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"--normalize none contradicts checkpoint .*, which holds 0.5,0.5,0.5/0.25"):
        load_classifier(tmp_path / "a.pth", dataset="CIFAR10", normalize="none")


@torch.no_grad()
@pytest.mark.parametrize(("depth", "asked", "arch"), [(26, "R26", "R26"), (50, "cifar_resnet50", "cifar_resnet50")])
def test_any_depth_of_6n_plus_2(tmp_path, depth, asked, arch):
    """R50 is ImageNet's: the small images' network of that depth has its own name."""
    network, images = shaken(CifarResNet(depth)), torch.rand(1, 3, 32, 32)
    path = saved(tmp_path / "a" / "checkpoint.pth.tar", network, "zip")
    loaded = load_classifier(path, asked, "CIFAR10", noise_sd=0.25, normalize="none")
    assert loaded.arch == arch
    torch.testing.assert_close(loaded.classifier(images)[0], network(images), rtol=1e-5, atol=1e-5)
    assert build_classifier(arch, "CIFAR10", 2)(images).shape == (2, 1, 10)


def test_imagenet_of_32x32_as_a_folder_of_images(tmp_path):
    network, spec = shaken(CifarResNet(20, 7)), DataSpec("ImageFolder", (3, 32, 32), 7, (0.1,) * 3, (0.2,) * 3)
    path = saved(tmp_path / "a" / "checkpoint.pth.tar", network, "zip")
    loaded = load_classifier(path, None, "ImageFolder", spec=spec, normalize=".5/.5")
    assert loaded.normalize == "0.5,0.5,0.5/0.5,0.5,0.5" and loaded.spec is spec
    with pytest.raises(UserError, match="does not say the mean and deviation of its training images; give them"):
        load_classifier(path, dataset="ImageFolder", spec=spec, normalize="mean_std")
    with pytest.raises(UserError, match="ImageFolder's image size and classes are read from its files"):
        load_classifier(path, dataset="ImageFolder")


def small_stem():
    network = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return network


WAY_OUT = "certify it as your own function, --classifier my.py:build"


@pytest.mark.parametrize(
    ("network", "given", "message"),
    [
        (
            LeNet((6, 16)),
            {},
            r"is not a network that is known here: its keys are 1.conv1.weight, .* and 4 more; .* LeNet.*" + WAY_OUT,
        ),
        (
            CifarResNet(8, 1000),
            {},
            r"'1.fc.weight' is \(1000, 64\) in it, not \(10, 64\) .wrong classes: it knows 1000, the data have 10",
        ),
        (
            small_stem(),
            {},
            r"'1.conv1.weight' is \(64, 3, 3, 3\) in it, .*another kernel, so another architecture.*" + WAY_OUT,
        ),
        (wide_resnet50_2(num_classes=10), {}, r"another width, so another architecture\); " + WAY_OUT),
        (CifarResNet(8), {"dataset": "MNIST"}, "wrong channels: it takes 3, the data have 1; is --dataset right"),
        (CifarResNet(8), {"arch": "cifar_resnet110"}, "--arch R110 contradicts checkpoint .* has arch R8"),
        (CifarResNet(8), {"num_heads": 5}, "--num_heads 5 contradicts"),
        (CifarResNet(8), {"dataset": None}, "does not say its dataset: give --dataset"),
        (CifarResNet(8), {"normalize": "std"}, "unknown normalisation 'std': choose from auto, mean_std, centre, none"),
    ],
)
def test_what_is_not_known_is_one_line(tmp_path, network, given, message):
    path = saved(tmp_path / "a" / "checkpoint.pth.tar", network, "zip")
    with pytest.raises(UserError, match=message) as refused:
        load_classifier(path, **{"dataset": "CIFAR10"} | given)
    assert "\n" not in str(refused.value) and "heads." not in str(refused.value)


def test_what_the_file_lacks_has_the_files_names(tmp_path):
    state = CifarResNet(8).state_dict()
    del state["layer3.0.conv2.weight"], state["layer3.0.bn2.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"does not fit R8 with 1 head on CIFAR10: it lacks 'layer3.0.conv2.weight'"):
        load_classifier(tmp_path / "a.pth", dataset="CIFAR10")


def test_our_own_checkpoint_was_trained_with_mean_std(digits_models):
    assert load_classifier(digits_models[1], normalize="mean_std").normalize == "mean_std"
    with pytest.raises(UserError, match=r"--normalize none contradicts checkpoint .* with mean_std"):
        load_classifier(digits_models[1], normalize="none")
