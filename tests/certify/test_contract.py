"""What a classifier of the user's own must do: each way to break it is found and named; what keeps it passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm

from spacte import certify_dataset
from spacte.certify.contract import check_contract
from spacte.logs.certlog import read_log
from spacte.model.foreign import ForeignClassifier
from spacte.model.identity import parameters_sha256
from spacte.utils import UserError

CPU = torch.device("cpu")
COMPANY = "depends on the other images of its batch"
STATE = "answers the same images in another way after it has seen others: it keeps a state"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


IMAGES = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.25 * torch.randn(
    32, 3, 8, 8, generator=torch.Generator().manual_seed(2)
)


def check(function, images=IMAGES, precision="fp32"):
    classifier = ForeignClassifier(function, CPU, precision, 100, compiled=False)
    return len(check_contract(classifier, images, 10)), classifier


class Attention(nn.Module):
    """Each image sees a little of the others."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, images):
        features = self.net[1](images.flatten(1))
        mixed = F.scaled_dot_product_attention(features[None], features[None], features[None])[0]
        return self.net[3](F.relu(features + 0.1 * mixed))


def dynamic_int8(images):
    """One scale for the whole batch, as dynamic quantisation takes it."""
    network = NETWORK
    scale = images.abs().max() / 127
    return network((images / scale).round() * scale)


class MovingMean(nn.Module):
    """An average over what it has seen."""

    def __init__(self):
        super().__init__()
        self.net, self.mean = net(), torch.zeros(1)

    def forward(self, images):
        with torch.no_grad():
            self.mean = 0.99 * self.mean + 0.01 * images.mean()
        return self.net(images - self.mean)


class Observed(nn.Module):
    """torch's fake quantisation with its observer on."""

    def __init__(self):
        super().__init__()
        self.net, self.quantise = net(), torch.ao.quantization.FakeQuantize()

    def forward(self, images):
        return self.net(self.quantise(images))


class Seeded(nn.Module):
    """Noise that is the same for the same place of the batch."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, images):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return self.net(images + 0.1 * noise)


class Counter(nn.Module):
    """Changes once, after a few calls."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = net(), 0

    def forward(self, images):
        self.calls += 1
        return self.net(images) + (torch.arange(10) if self.calls > 4 else 0)


NETWORK = net()
BROKEN = {
    "deviation of the batch": (lambda images: NETWORK(images / images.std()), COMPANY),
    "range of the batch": (lambda x: NETWORK((x - x.min()) / (x.max() - x.min())), COMPANY),
    "dynamic int8": (dynamic_int8, COMPANY),
    "attention across the batch": (Attention(), COMPANY),
    "brightest of the batch": (lambda images: NETWORK(images / images.amax((0, 2, 3), keepdim=True)), COMPANY),
    "all are copies": (lambda x: NETWORK(x) + 5 * (x == x[:1]).all() * torch.arange(10), "in a batch of its copies"),
    "place in the batch": (Seeded(), "changes with its position in the batch"),
    "dropout": (lambda images: F.dropout(NETWORK(images), 0.01), "gives two different answers for the same images"),
}
STATEFUL = {"moving mean": MovingMean, "observers": Observed, "a counter": Counter}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_company_place_and_chance_are_found(how):
    function, message = BROKEN[how]
    with pytest.raises(UserError, match=message):
        check(function)


@pytest.mark.parametrize("how", STATEFUL)
@pytest.mark.filterwarnings("ignore")
def test_a_state_is_found(how):
    with pytest.raises(UserError, match=f"({STATE}|two different answers|{COMPANY})"):
        check(STATEFUL[how]())


def test_a_state_that_shows_late_is_named():
    """It answers four batches alike."""
    with pytest.raises(UserError, match=STATE):
        check(Counter())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("count", [32, 31, 1])
def test_a_function_of_each_image_keeps_it(precision, count):
    assert check(net(), IMAGES[:count], precision)[0] == 1


def in_place(images):
    return NETWORK(images.sub_(0.5).div_(0.25))


def test_work_in_the_input_is_harmless():
    """It is found, and the function gets images of its own from then on."""
    heads, classifier = check(in_place)
    assert heads == 1 and classifier.copies
    images = IMAGES.clone()
    expected = NETWORK((images - 0.5) / 0.25)
    torch.testing.assert_close(classifier(images)[0], expected)
    assert torch.equal(images, IMAGES)
    assert not check(net())[1].copies


# --- modules as they come ---


def half():
    return net().half()


class HuggingFaceOutput:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (half(), "its parameters are float16, the images float32: return module.float"),
        (lambda images: HuggingFaceOutput(NETWORK(images)), "a HuggingFaceOutput: .*: return its .logits"),
        (lambda images: (NETWORK(images), images), r"returned a tuple: .*: return its \[0\]"),
        (lambda images: {"out": NETWORK(images)}, r"returned a dict: .*: return its \['out'\]"),
    ],
)
def test_what_does_not_fit_has_advice(function, message):
    with pytest.raises(UserError, match=message):
        check(function)


def exported():
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(net(), (IMAGES,), dynamic_shapes=({0: batch},)).module()


def lazy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def with_weight_norm():
    network = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(192, 10)))
    network(IMAGES)  # its weight is then no leaf, which deepcopy refuses
    return network


MODULES = {
    "plain": net,
    "scripted": lambda: torch.jit.script(net()),
    "traced": lambda: torch.jit.trace(net(), IMAGES),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(net())),
    "exported": exported,
    "lazy": lazy,
    "weight norm": with_weight_norm,
    "inference tensors": lambda: torch.inference_mode()(net)(),
}


@pytest.mark.parametrize("how", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_modules_of_every_kind_are_certified(tmp_path, how):
    module, data = MODULES[how](), (IMAGES[:4].clamp(0, 1), torch.arange(4))
    log = certify_dataset(module, data, noise_sd=0.25, num_classes=10, N0=10, N=20, device="cpu", logs_dir=tmp_path)
    assert len(read_log(log)) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_module_is_known_by_its_constants():
    frozen = [torch.jit.freeze(torch.jit.script(net())) for _ in range(2)]
    other = net()
    other[1].weight.data += 1
    hashes = [parameters_sha256(one) for one in (*frozen, torch.jit.freeze(torch.jit.script(other)))]
    assert hashes[0] == hashes[1] != hashes[2]
