"""A published network is the one that was trained, after its BatchNorms' statistics, or it is refused.

Networks here get their statistics from one pass over noised images, as training would leave them. Networks that were
trained on CIFAR-10 (R20 and R18, 60 to 400 steps of 64 images, sigma .25 to 1, with crops of 4 pixels, of random size
or none, also on adversarial images; 256 test images) gave: right ones at most .0015 nats in bn1 and .016 in any layer;
CIFAR-100's constants for CIFAR-10's .0033 in bn1, ImageNet's .0079 and more, a deviation of .2023 for .2471 .014 and
more; an R18 without its max-pool, or with stride 1 in its stem, 1.2 in a later layer, an R20 with one
stride or dilation changed .011 and more, where right ones of its training lay at .0002 to .0006. R8s of digits, 12
epochs of each defence but CAT-RS: bn1 .00004 (Consistency) to .0029 (SmoothAdv with its strongest attack, a quarter of
the noise's norm); stability training, .028 under noise on all images, .00008 under noise on half of them.
"""

import pytest
import torch
from test_published import CifarResNet
from torch import nn
from torchvision.models import resnet18

from spacte.data.sources import open_split
from spacte.data.spec import DataSpec, data_spec
from spacte.model import build_network
from spacte.model.batchnorm import FirstLayer, statistics_kl
from spacte.model.checkpoint import load_classifier
from spacte.model.normalisation import (
    NORMALISATIONS,
    Normalize,
    are_the_same,
    constants,
    known,
    name_of,
    normalisation,
)
from spacte.model.recognition import check_normalisation
from spacte.utils import UserError

CIFAR = data_spec("CIFAR10")
TRUE = "0.4914,0.4822,0.4465/0.2471,0.2435,0.2616"
SIGMA = 0.25


def pictures(count, size=32, seed=0):
    """Smooth coloured blobs with the channels' means and contrasts about those of photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator) + torch.randn(count, 1, 1, 1, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return (torch.tensor(CIFAR.mean).view(3, 1, 1) + 0.17 * smooth).clamp(0, 1)


def with_statistics(network, name, spec=CIFAR, size=32, sigma=SIGMA, images=None):
    """The network with the statistics that many batches of such images leave."""
    images = pictures(256, size, seed=1) if images is None else images
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum, layer.num_batches_tracked = 1.0, torch.tensor(999)
            nn.init.uniform_(layer.weight, 0.5, 1)
            nn.init.normal_(layer.bias, 0, 0.1)
    with torch.no_grad():
        network.train()(normalisation(name, spec)(images + sigma * torch.randn_like(images)))
    return network.eval()


def ours(network, path):
    """As it is loaded from a file of the field."""
    torch.save({"state_dict": {f"1.{key}": value for key, value in network.state_dict().items()}}, path)
    return load_classifier(path, dataset="CIFAR10").classifier[1]


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


@pytest.fixture
def loaded(tmp_path):
    """An R8 with the statistics of training after a normalisation, as it is loaded."""
    return lambda name, **how: ours(with_statistics(CifarResNet(8), name, **how), tmp_path / "a.pth")


@pytest.mark.parametrize("name", list(known(CIFAR)))
def test_the_normalisation_is_read_off_the_data(loaded, name):
    found, line = check_normalisation(loaded(name), None, CIFAR, pictures(256), SIGMA)
    twins = ("0.5071,0.4865,0.4409/0.2673,0.2564,0.2762", "0.5071,0.4867,0.4408/0.2675,0.2565,0.2761")
    assert found == name or {found, name} == set(twins)
    assert f"--normalize auto takes {found}: bn1's inputs lie 0.00" in line
    assert ("is too much like it to tell" in line) == (name in twins)


def test_constants_that_are_not_known_are_estimated(loaded):
    network = loaded("0.4,0.5,0.6/0.3,0.2,0.4")
    with pytest.raises(UserError, match=r"the nearest known, bn1's .* would fit to ") as refused:
        check_normalisation(network, None, CIFAR, pictures(256), SIGMA)
    name = str(refused.value).split("give --normalize ")[1].split()[0]
    estimated, right = constants(name, CIFAR), ((0.4, 0.5, 0.6), (0.3, 0.2, 0.4))
    assert torch.tensor(estimated).sub(torch.tensor(right)).abs().max() < 0.03
    assert check_normalisation(network, name, CIFAR, pictures(256), SIGMA) == (name, None)


def test_a_wrong_name_is_refused_and_a_right_one_stands(loaded):
    network = loaded(TRUE)
    assert check_normalisation(network, TRUE, CIFAR, pictures(256), SIGMA) == (TRUE, None)
    for name in ("mean_std", "0.5071,0.4865,0.4409/0.2673,0.2564,0.2762"):
        with pytest.raises(UserError, match=rf"--normalize {name} contradicts the checkpoint: .* with {TRUE}"):
            check_normalisation(network, name, CIFAR, pictures(256), SIGMA)


def test_the_noise_of_training_is_found_where_another_is_asked_for(loaded):
    found, line = check_normalisation(loaded("mean_std", sigma=0.5), None, CIFAR, pictures(256), 0.25)
    assert found == "mean_std" and "it was trained with noise 0.5, and is evaluated with 0.25" in line


def test_stability_training_shows_noise_to_half_of_the_images(tmp_path):
    """Its statistics are an average over clean and noised batches."""
    images = pictures(256, seed=1)
    images[::2] += SIGMA * torch.randn_like(images[::2])
    network = ours(with_statistics(CifarResNet(8), "mean_std", sigma=0.0, images=images), tmp_path / "a.pth")
    for name in (None, "mean_std"):
        assert check_normalisation(network, name, CIFAR, pictures(256), SIGMA)[0] == "mean_std"


def without_pool():
    network = resnet18(num_classes=10)
    network.maxpool = nn.Identity()
    return network


def changed(change, depth=8):
    def make():
        network = CifarResNet(depth)
        change(network)
        return network

    return make


def halved_by_the_stem(network):
    network.conv1.stride = (2, 2)


def dilated(network):
    for block in network.layer3[1:]:
        block.conv1.dilation = block.conv1.padding = (2, 2)


def leaky(network):
    network.layer1[0].relu = nn.LeakyReLU(0.3)


@pytest.mark.parametrize("name", [None, "mean_std"])
@pytest.mark.parametrize(
    "make",
    [without_pool, changed(halved_by_the_stem), changed(dilated, depth=14), changed(leaky)],
    ids=["no max-pool", "stride", "dilation", "another activation"],
)
def test_another_geometry_with_the_same_keys_is_refused(tmp_path, make, name):
    network = ours(with_statistics(make(), "mean_std"), tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"not the one that was trained: bn1's statistics fit .* nats away .* another stride"
    ):
        check_normalisation(network, name, CIFAR, pictures(256), SIGMA)


def test_images_of_another_size_are_refused(loaded):
    """Noise is coarser on smaller ones, and the borders are a larger part."""
    network, small = loaded("mean_std"), nn.functional.interpolate(pictures(256), size=12, mode="area")
    with pytest.raises(UserError, match="auto cannot tell"):
        check_normalisation(network, None, CIFAR, small, SIGMA)


def test_few_images_refuse_no_right_network(loaded):
    for seed in range(3):
        assert (
            check_normalisation(loaded("mean_std"), "mean_std", CIFAR, pictures(20, seed=seed), SIGMA)[0] == "mean_std"
        )


def test_there_is_no_guess_where_the_data_do_not_tell(loaded):
    images = pictures(256)
    fresh = build_network("R8", 1, 10, 3)
    with pytest.raises(UserError, match=r"cannot tell: bn1 has seen only 0 batches .* mean_std, centre, none or const"):
        check_normalisation(fresh, None, CIFAR, images, SIGMA)
    assert "has seen only 0 batches" in check_normalisation(fresh, "none", CIFAR, images, SIGMA)[1]
    lost = loaded("centre")
    lost.bn1.running_mean.fill_(3.0)
    with pytest.raises(
        UserError, match=r"auto cannot tell: with \S+, the nearest known, .* is --noise_sd the one of tr"
    ):
        check_normalisation(lost, None, CIFAR, images, SIGMA)
    assert (
        "are normalisation, --noise_sd and images those of training?"
        in check_normalisation(lost, "none", CIFAR, images, SIGMA)[1]
    )


def test_a_network_that_is_blind_to_the_mean_has_two_normalisations(tmp_path):
    """Its first layer takes differences of pixels; without padding it sees no border either."""
    network = CifarResNet(8)
    network.conv1.weight.data -= network.conv1.weight.data.mean((2, 3), keepdim=True)
    network.conv1.padding = (0, 0)
    network = ours(with_statistics(network, "centre"), tmp_path / "a.pth")
    network.conv1.padding = (0, 0)
    with pytest.raises(UserError, match=r"cannot tell: (centre and none|none and centre) fit alike"):
        check_normalisation(network, None, CIFAR, pictures(256), SIGMA)


def test_the_first_layer_is_known_after_every_normalisation(loaded):
    """The closed form is the distance that a pass through the layer measures, padding included."""
    network, images = loaded("centre"), pictures(64)
    layer = FirstLayer(network, images)
    for values in (*known(CIFAR).values(), ((0.1, 0.9, 0.3), (0.2, 3.0, 0.7))):
        measured = statistics_kl(nn.Sequential(Normalize(*values), network), images)["1.bn1"][0]
        assert layer.distance(values) == pytest.approx(measured, rel=1e-4)


def test_digits_of_one_channel(digits_models):
    split = open_split("digits", ".", False)
    images = torch.stack([split[idx][0] for idx in range(256)])
    network = load_classifier(digits_models[1]).classifier[1]
    assert check_normalisation(network, None, split.spec, images, 0.5)[0] == "mean_std"


def test_names_and_constants_of_a_normalisation():
    for name in NORMALISATIONS:
        assert name_of(constants(name, CIFAR), CIFAR) == name
    assert constants(".5/.25", CIFAR) == ((0.5,) * 3, (0.25,) * 3)
    assert name_of(constants(".5/.25", CIFAR), CIFAR) == "0.5,0.5,0.5/0.25,0.25,0.25"
    assert name_of(constants("0,0,0/1,1,1", CIFAR), CIFAR) == "none"
    exact = "0.49139968,0.48215841,0.44653091/0.24703223,0.24348513,0.26158784"  # CIFAR-10's in much code
    assert name_of(constants(exact, CIFAR), CIFAR) == exact, "others from the seventh digit on are others"
    for text in ("std", "0.5", "0.5/0", "0.5,0.5/0.1", "a,b,c/1,1,1", "0.5/nan", "nan/0.5"):
        with pytest.raises(UserError, match=r"unknown normalisation .*: choose from auto, mean_std, centre, none or"):
            constants(text, CIFAR)
    with pytest.raises(UserError, match=r"CIFAR10 has 3 channels, there are constants for 2"):
        constants("1,1/1,1", CIFAR)


def test_the_known_normalisations_have_the_constants_that_published_code_has():
    twins = ("0.5071,0.4865,0.4409/0.2673,0.2564,0.2762", "0.5071,0.4867,0.4408/0.2675,0.2565,0.2761")
    imagenet, halves = "0.485,0.456,0.406/0.229,0.224,0.225", "0.5,0.5,0.5/0.5,0.5,0.5"
    assert list(known(CIFAR)) == [*NORMALISATIONS, halves, TRUE, *twins, imagenet]
    assert known(CIFAR)["mean_std"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert known(data_spec("ImageNet"))["mean_std"] == constants(imagenet, CIFAR)


def test_no_network_is_known_to_be_trained_with_the_constants_of_a_users_test_images():
    for mean, others in (((0.1,), 0), ((0.1,) * 3, 5)):
        spec = DataSpec("ImageFolder", (len(mean), 8, 8), 7, mean, tuple(2 * one for one in mean))
        found = known(spec)
        assert (spec.mean, spec.std) not in found.values() and "centre" not in found
        assert next(iter(found)) == "none" and len(found) == 2 + others


def test_normalisations_are_the_same_where_no_channel_differs():
    one = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert are_the_same(one, ((0.501, 0.499, 0.5), (0.251, 0.25, 0.249)))
    for mean, std in (((0.502, 0.5, 0.5), one[1]), ((0.5, 0.5, 0.498), one[1]), (one[0], (0.25, 0.252, 0.25))):
        assert not are_the_same(one, (mean, std)) and not are_the_same((mean, std), one)
