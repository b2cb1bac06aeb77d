import math

import pytest
import torch
from conftest import golden

from spacte.data.spec import DataSpec, data_spec
from spacte.model import ARCHITECTURES, build_classifier, build_network, checkpoint
from spacte.model.frozen import freeze
from spacte.utils import UserError

GOLDEN = golden("models")


def fill(network, seed):
    """The golden file's rule, which makes every tensor from its name's place."""
    state = network.state_dict()
    for j, key in enumerate(sorted(state)):
        tensor = state[key]
        if key.endswith("num_batches_tracked"):
            continue
        i = torch.arange(tensor.numel(), dtype=torch.float64)
        v = (torch.sin(12.9898 * (i + 1) + 78.233 * (j + 1 + seed)).abs() * 43758.5453).frac() * 2 - 1
        v = v.view(tensor.shape)
        if key.endswith("running_var"):
            v = 1 + 0.5 * v
        elif tensor.dim() >= 2:
            v = v * math.sqrt(2 / math.prod(tensor.shape[1:]))
        else:
            v = 0.6 + 0.1 * v if key.endswith("weight") else 0.1 * v
        state[key] = v.float()
    network.load_state_dict(state)
    return network.eval()


@pytest.fixture(scope="module", params=GOLDEN["models"], ids=lambda case: case["arch"])
def case_and_network(request):
    case = request.param
    num_classes = 1000 if case["arch"] == "R50" else case["num_classes"]
    return case, fill(build_network(case["arch"], case["num_heads"], num_classes, 3), GOLDEN["seed"])


def golden_input(case):
    numel = math.prod(case["input_shape"])
    x = 0.5 + 0.5 * torch.sin(0.013 * torch.arange(numel, dtype=torch.float64) + GOLDEN["seed"])
    return x.view(case["input_shape"]).float()


def test_keys_and_shapes_are_the_authors(case_and_network):
    case, network = case_and_network
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == case["keys"]


def test_logits_and_cosine_term_are_the_authors(case_and_network):
    case, network = case_and_network
    rtol = 1e-5 if case["arch"] == "R20" else 1e-4
    expected = torch.tensor(case["logits"])
    with torch.no_grad():
        logits = network(golden_input(case))[..., : expected.shape[-1]]
        torch.testing.assert_close(logits, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
        assert float(network.cosine_loss()) == pytest.approx(case["cosine_loss"], rel=rtol)


def test_the_frozen_network_gives_the_golden_logits(case_and_network):
    case, network = case_and_network
    frozen = freeze(torch.nn.Sequential(torch.nn.Identity(), network), torch.device("cpu"))
    expected = torch.tensor(case["logits"])
    with torch.inference_mode():
        logits = frozen(golden_input(case))[..., : expected.shape[-1]]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_runs(arch):
    network = build_network(arch, 2, 7, 1).eval()
    with torch.no_grad():
        assert network(torch.rand(3, 1, network.min_size, network.min_size)).shape == (2, 3, 7)


def test_convolutions_begin_as_he_et_al_say():
    """Normal, of variance 2 / fan_out: 16 channels of 3x3."""
    weight = build_classifier("R8", "digits", 1)[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.25)


def test_the_classifier_normalises_inside():
    classifier = build_classifier("R8", "CIFAR10", 2).eval()
    spec, x = data_spec("CIFAR10"), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    torch.testing.assert_close(classifier(x), classifier[1]((x - mean) / std))
    assert all(key.startswith("1.") for key in classifier.state_dict())


def test_the_cosine_term_of_one_head_is_0_and_of_equal_heads_the_number_of_pairs():
    assert float(build_network("R8", 1, 10, 1).cosine_loss().detach()) == 0
    network = build_network("R8", 4, 10, 1)
    for head in network.heads[1:]:
        head.load_state_dict(network.heads[0].state_dict())
    assert float(network.cosine_loss().detach()) == pytest.approx(6, rel=1e-5)


@pytest.mark.parametrize("prefix", ["1.", "1.module.", "module.1."])
def test_an_authors_checkpoint_loads(tmp_path, prefix):
    classifier = build_classifier("R8", "CIFAR10", 3).eval()
    state = {prefix + key.removeprefix("1."): value for key, value in classifier.state_dict().items()}
    path = tmp_path / "run" / "epoch9.pth"
    path.parent.mkdir()
    torch.save({"epoch": 9, "state_dict": state}, path)
    loaded = checkpoint.load_classifier(path, "R8", "CIFAR10", noise_sd=0.25)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.classifier(x), classifier(x))
    assert loaded.num_heads == 3 and loaded.run == "run"


def test_wrong_names_and_sizes_are_one_line():
    with pytest.raises(UserError, match=r"unknown architecture 'R9': choose from R8, .*R152"):
        build_network("R9", 1, 10, 3)
    with pytest.raises(UserError, match="num_heads is 0"):
        build_network("R8", 0, 10, 3)
    with pytest.raises(UserError, match="unknown data set 'cifar': choose from digits, CIFAR10"):
        build_classifier("R8", "cifar", 1)
    with pytest.raises(UserError, match=r"R18 needs images of at least 32x32 pixels, those of digits are 8x8"):
        build_classifier("R18", "digits", 1)
    with pytest.raises(UserError, match="read from its files"):
        build_classifier("R18", "ImageFolder", 1)


def test_any_spec_makes_a_classifier():
    spec = DataSpec("mine", (2, 24, 40), 5, (0.5, 0.5), (0.2, 0.2))
    with torch.no_grad():
        assert build_classifier("R14", spec, 2)(torch.rand(3, 2, 24, 40)).shape == (2, 3, 5)
