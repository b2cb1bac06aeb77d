"""The adapters in codes/examples certify other packages' networks, here with random weights, as these compute them."""

import importlib
import warnings

import pytest
import torch
from conftest import CODES, DIGITS, RUN_FLAGS
from torch import nn

from spacte import certify_dataset, open_split
from spacte.certify.contract import check_contract
from spacte.logs.certlog import read_log
from spacte.model import foreign
from spacte.model.identity import parameters_sha256

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(CODES / "examples"))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages'
        yield


def built(file, **arguments):
    return foreign.build(f"{CODES}/examples/{file}:build", arguments)


def is_certified(classifier, tmp_path, images=IMAGES, classes=10):
    data = (images, torch.arange(len(images)) % classes)
    log = certify_dataset(
        classifier,
        data,
        noise_sd=0.25,
        num_classes=classes,
        N0=10,
        N=20,
        device="cpu",
        logs_dir=tmp_path,
        batch_size=8,
    )
    assert len(read_log(log)) == len(images)


@torch.no_grad()
def normalised(images, mean, std):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def test_timm(tmp_path):
    import timm

    network = timm.create_model("resnet10t", num_classes=10).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    classifier = built("from_timm.py", model="resnet10t", weights=str(tmp_path / "a.pth"), num_classes=10)
    torch.testing.assert_close(classifier.eval()(IMAGES), network(normalised(IMAGES, *IMAGENET)), rtol=1e-5, atol=1e-5)
    assert built("from_timm.py", model="resnet10t", num_classes=10, resize=64)(IMAGES).shape == (4, 10)
    is_certified(classifier, tmp_path)


@torch.no_grad()
def test_torchvision(tmp_path):
    from torchvision.models import shufflenet_v2_x0_5

    network = shufflenet_v2_x0_5(num_classes=10).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    classifier = built(
        "from_torchvision.py", arch="shufflenet_v2_x0_5", weights=str(tmp_path / "a.pth"), num_classes=10
    )
    torch.testing.assert_close(classifier.eval()(IMAGES), network(normalised(IMAGES, *IMAGENET)), rtol=1e-5, atol=1e-5)
    is_certified(classifier, tmp_path)


@torch.no_grad()
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}'
    )
    classifier = built("from_transformers.py", folder=str(tmp_path / "vit")).eval()
    small = torch.rand(4, 3, 16, 16)
    expected = network(pixel_values=normalised(small, [0.5] * 3, [0.5, 0.25, 0.5])).logits
    torch.testing.assert_close(classifier(small), expected)
    is_certified(classifier, tmp_path)


@torch.no_grad()
def test_robustbench(tmp_path):
    """A network of its zoo, whose file lies where the zoo looks before it downloads."""
    pytest.importorskip("timm")
    import from_robustbench
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    entry = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]["Wong2020Fast"]
    network = entry["model"]().eval()
    file = tmp_path / "models" / "cifar10" / "Linf" / "Wong2020Fast.pt"
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    classifier = from_robustbench.build("Wong2020Fast", model_dir=str(tmp_path / "models"))
    torch.testing.assert_close(classifier(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-5)
    is_certified(classifier, tmp_path)


@pytest.mark.parametrize("batch", ["N", 4])
def test_onnx_runtime(tmp_path, batch):
    from onnx import TensorProto, helper, numpy_helper, save

    weight = torch.randn(10, 3072, generator=torch.Generator().manual_seed(1))
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(weight.numpy(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, tmp_path / "a.onnx")
    if batch == 4:
        with pytest.raises(foreign.UserError, match="takes batches of 4 images: export it with a free first dimension"):
            built("onnx_runtime.py", path=str(tmp_path / "a.onnx"))
        return
    classifier = built("onnx_runtime.py", path=str(tmp_path / "a.onnx"))
    torch.testing.assert_close(classifier(IMAGES), IMAGES.flatten(1) @ weight.T, rtol=1e-4, atol=1e-4)
    assert parameters_sha256(classifier) is not None
    is_certified(classifier, tmp_path)


def test_int8_is_certified_as_itself(tmp_path):
    """Scales that were fixed beforehand keep the contract; its votes are the quantised network's own."""
    import int8

    network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)).eval()
    split = open_split("digits", ".", True)
    quantised = int8.quantised(network, split, 0.5, images=64)
    assert any("quantized" in type(module).__module__ for module in quantised.modules())
    images = torch.stack([split[idx][0] for idx in range(32)])
    with torch.no_grad():
        moved = (quantised(images) - network(images)).abs().max()
        assert 0 < moved < 0.1 * network(images).abs().max()
    assert len(check_contract(foreign.ForeignClassifier(quantised, CPU, "fp32", 32, False), images, 10)) == 1
    is_certified(quantised, tmp_path, images[:4])


def test_diffusion_denoised_smoothing(script, digits_models, tmp_path):
    """Trained by the example's command, one step takes half of the noise away; it is deterministic, and certified."""
    code, out, err = script("examples/diffusion_denoised.py", "--dataset", "digits", "--epochs", 4, "--device", "cpu")
    assert code == 0 and "epoch 4/4" in out, err
    example = importlib.import_module("diffusion_denoised")
    whole = built("diffusion_denoised.py", diffusion="diffusion", classifier=digits_models[1], noise_sd=0.5)
    front = whole[0]
    split = open_split("digits", ".", False, CPU)
    images, _ = next(split.batches(len(split)))
    with torch.no_grad():
        error = (front(images + 0.5 * torch.randn(images.shape)) - images).square().mean()
    assert error < 0.5**2 / 2
    is_certified(whole, tmp_path, images[:4])
    abar = front.abar
    assert (1 - abar) / abar == pytest.approx(1.0, rel=0.03)  # (2 sigma)^2
    with pytest.raises(foreign.UserError, match="the diffusion model ends at noise"):
        example.build("diffusion", digits_models[1], 500.0)


def test_the_diffusion_step_inverts_what_the_model_was_trained_on():
    """With a model that knows the noise, the step returns the image: scale, time and the map to [-1, 1] are right."""
    example = importlib.import_module("diffusion_denoised")
    from diffusers import DDPMScheduler

    images, noise, sigma = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8), 0.25

    class Knows(nn.Module):
        def forward(self, state, time):
            self.seen = state, time
            return type("Output", (), {"sample": noise})

    scheduler = DDPMScheduler()
    step = example.OneStep(Knows(), scheduler.alphas_cumprod, sigma)
    abar = step.abar
    exact = ((1 - abar) / abar) ** 0.5 / 2  # the sigma of the time's own noise, next to 0.25
    torch.testing.assert_close(step(images + exact * noise), images, rtol=1e-4, atol=1e-4)
    state, time = step.unet.seen
    times = torch.full((3,), time)
    torch.testing.assert_close(state, scheduler.add_noise(2 * images - 1, noise, times), rtol=1e-4, atol=1e-4)
    assert exact == pytest.approx(sigma, rel=0.02)


def test_a_denoiser_in_front(script, digits_models, tmp_path):
    """It takes more than half of the noise away; both together are certified through --classifier."""
    code, out, err = script("examples/denoised.py", *DIGITS, "--epochs", 8, "--device", "cpu")
    assert code == 0 and "epoch 8/8" in out, err
    arguments = ("--classifier_args", "denoiser=denoiser.pth", f"classifier={digits_models[1]}")
    command = ("--classifier", f"{CODES}/examples/denoised.py:build", *arguments, *DIGITS, "--skip", 60, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *command)
    assert code == 0, err
    (log,) = tmp_path.rglob("build-denoiser-denoiser-classifier-epoch4-certify-skip-60.log")
    assert len(read_log(log)) == 6

    import denoised  # the script's folder is on the path

    split = open_split("digits", ".", False, torch.device("cpu"))
    images, _ = next(split.batches(len(split)))
    front, _ = denoised.build("denoiser.pth", digits_models[1])
    with torch.no_grad():
        error = (front(images + 0.5 * torch.randn(images.shape)) - images).square().mean()
    assert error < 0.5**2 / 2
