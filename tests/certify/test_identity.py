"""A log is of one function and of one set of images, whatever changes around it."""

import json
import shutil

import pytest
import torch
from conftest import SETTINGS, beside, linear, without_time
from torch.utils.data import TensorDataset

from spacte import certify_dataset, load_classifier, read_log
from spacte.certify.contract import answers
from spacte.files import sha256
from spacte.model.identity import parameters_sha256
from spacte.utils import UserError


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_log_is_not_another_functions_with_the_same_parameters(digits, tmp_path):
    """Code is not seen, but its answers are. Rounding is no difference, and older logs do not tell."""
    network, own = linear().eval(), {"noise_sd": 0.5, "num_classes": 10, "dataset": "d", "name": "n", **SETTINGS}
    log = certify_dataset(lambda x: network(x), digits, max=100, **own)
    for other in (lambda x: -network(x), lambda x: network(2 * x - 0.5), lambda x: network(x.clamp(-0.7, 1.7))):
        with pytest.raises(UserError, match=r"answers \(other logits there than here on the same noisy images\)"):
            certify_dataset(other, digits, max=100, **own)
    certify_dataset(lambda x: network(x + 1e-4), digits, max=100, **own)
    written = log.with_suffix(".json")
    noted = json.loads(written.read_text())
    assert len(noted["config"].pop("answers")) == 96
    written.write_text(json.dumps(noted))
    certify_dataset(lambda x: -network(x), digits, max=100, **own)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_module_votes_by_the_weights_that_it_has_now(digits):
    """They are constants of what is compiled."""
    network, own = linear(), {"noise_sd": 0.5, "num_classes": 10, "dataset": "d", **SETTINGS}
    for name in ("first", "second"):
        compiled, plain = (
            certify_dataset(network, digits, name=f"{name}-{kind}", compile=kind == "compiled", **own)
            for kind in ("compiled", "plain")
        )
        assert without_time(compiled) == without_time(plain), name
        network[2].weight.data = network[2].weight.data.roll(1, 0)


def test_a_checkpoints_network_is_the_one_that_its_file_held(digits, digits_models, tmp_path):
    """The hash in the log is of what was read, although the file is another by now; a changed network is refused."""
    path = tmp_path / "x.pth"
    shutil.copy(digits_models[1], path)
    loaded, before = load_classifier(path), sha256(path)
    shutil.copy(digits_models[0], path)
    log = certify_dataset(loaded, digits, **SETTINGS)
    assert json.loads(beside(log, ".json").read_text())["config"]["checkpoint_sha256"] == [before] != [sha256(path)]
    changes = {
        "weights": lambda one: one.network.conv1.weight.data[0].mul_(1.01),
        "normalisation": lambda one: one[0].mean.mul_(0.5),
        "stride": lambda one: setattr(one.network.conv1, "stride", (2, 2)),
        "hook": lambda one: one.network.register_forward_hook(lambda module, inputs, logits: -logits),
    }
    for name, change in changes.items():
        loaded = load_classifier(path)
        change(loaded.classifier)
        with pytest.raises(
            UserError, match=r"x.pth': the classifier has changed since it was loaded; load it again, o"
        ):
            certify_dataset(loaded, digits, **SETTINGS)
        certify_dataset(loaded.classifier, digits, noise_sd=0.5, num_classes=10, name=name, **SETTINGS)


def ours(digits_models, digits):
    return load_classifier(digits_models[0]), {}


def published(digits_models, digits):
    state = torch.load(digits_models[1], weights_only=True)["state_dict"]
    state = {key.replace("heads.0.0", "layer3").replace("heads.0.1", "fc"): value for key, value in state.items()}
    torch.save({"state_dict": state}, "published.pth")
    return load_classifier("published.pth", dataset="digits", noise_sd=0.5), {}


def int8(digits_models, digits):
    images, _ = digits
    return load_classifier(digits_models[0]).with_scales(images[:30]), {"precision": "int8"}


@pytest.mark.parametrize("kind", [ours, published, int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_process_has_set_changes_no_log_and_stays_set(digits, digits_models, kind, dtype):
    """Default dtype, autocast, random numbers, torch's arithmetic."""
    loaded, more = kind(digits_models, digits)
    log = certify_dataset(loaded, digits, **SETTINGS, **more)
    expected, state = without_time(log), torch.get_rng_state()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(dtype)
    try:
        loaded, more = kind(digits_models, digits)
        with torch.autocast("cpu", torch.bfloat16):
            again = certify_dataset(loaded, digits, overwrite=True, **SETTINGS, **more)
        assert torch.get_default_dtype() == dtype
        assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
    assert again == log and without_time(log) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_that_changes_when_it_is_read_again_ends_the_run(digits, tmp_path):
    """Although none of the first ones does: here the 200th is mirrored at each second time."""
    times = []

    class Mirrored(TensorDataset):
        def __getitem__(self, idx):
            image, label = super().__getitem__(idx)
            times.extend([idx] * (idx == 210))
            return (image.flip(-1) if idx == 210 and len(times) % 2 == 0 else image), label

    with pytest.raises(UserError, match="item 210 differs each time it is read: switch the data's augmentation off"):
        certify_dataset(linear(), Mirrored(*digits), noise_sd=0.5, num_classes=10, **SETTINGS)
    (log,) = tmp_path.rglob("*skip-30.log")
    rows = read_log(log)["idx"].tolist()
    assert rows == [*range(0, 30 * len(rows), 30)] and len(rows) >= 5, "the last ones shared its batch"


NETWORKS = {}


def by_name(images):
    return NETWORKS["net"](images)


def test_the_hash_sees_tensors_of_any_layout():
    plain = torch.eye(3)
    hashes = []
    for one in (plain, plain.to_sparse(), plain.to_sparse_csr(), 2 * plain.to_sparse(), torch.ones(2) * (1 + 1j)):
        module = torch.nn.Module()
        module.register_buffer("held", one)
        hashes.append(parameters_sha256(module))
    assert hashes[0] == hashes[1] == hashes[2] and len(set(hashes)) == 3
    module.held = (torch.ones(2) * (1 - 1j)).conj()
    assert parameters_sha256(module) == hashes[-1]


def test_the_hash_sees_the_parameters_that_a_callable_holds():
    network, tensor = torch.nn.BatchNorm1d(3), torch.ones(3)

    class Held:
        def __init__(self):
            self.parts = {"a": [network]}

        def __call__(self, images):
            return images

    hashes = [parameters_sha256(one) for one in (network, lambda x: network(x), Held(), Held().__call__)]
    assert len(set(hashes)) == 1 and parameters_sha256(lambda x: x + tensor) is not None
    NETWORKS["net"] = network
    assert parameters_sha256(lambda x: by_name(x)) == hashes[0]
    network.running_mean += 1
    assert parameters_sha256(network) != hashes[0]
    assert parameters_sha256(lambda x: x) is None


def test_answers_are_of_the_logits_size_not_of_their_sign_alone():
    """Of two classes, one of which always has the logit 0, a moved threshold shows and rounding does not."""
    of_one = torch.linspace(-3, 3, 32)
    logits, moved, rounded = (
        torch.stack([one, torch.zeros(32)], -1)[None] for one in (of_one, of_one + 0.3, of_one + 0.003)
    )
    found = torch.tensor(answers(logits))
    assert (torch.tensor(answers(moved)) - found).abs().max() > 0.05
    assert (torch.tensor(answers(rounded)) - found).abs().max() < 0.01
