"""The scales of int8: what they are measured on, their file, networks that they do not fit."""

import copy
import math
import os
import sys
from pathlib import Path

import children
import pytest
import torch
from conftest import CODES
from test_frozen import CPU, warmed_up
from test_int8 import digits

from spacte.model import build_classifier
from spacte.model.frozen import freeze, scales_of
from spacte.model.scales import Scales
from spacte.utils import UserError


def test_the_scales_do_not_depend_on_the_instructions_that_torch_uses():
    """Vectorised logarithms and cosines, of which normal noise is made, differ in their last digits."""
    code = "from test_int8 import digits; print(digits(1)[1].sha256)"
    found = set()
    for capability in ("default", "avx2"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": f"{CODES}:{CODES.parent}/tests"}
        result = children.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment)
        found.add(result.stdout)
    assert len(found) == 1 and len(found.pop()) == 65


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_the_scales_are_measured_under_the_noise_that_is_asked_for(sigma):
    classifier, images = warmed_up("R8", "digits", (1, 8, 8)), torch.rand(20, 1, 8, 8)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest = float(classifier[0](images + sigma * noise).abs().max())
    peak = scales_of(classifier, images, sigma).peaks["conv1"]
    assert largest <= peak <= largest * (1 + 2**-7), "rounded up"


def test_scales_of_another_network_are_refused():
    classifier, scales, _ = digits(1)
    for arch, heads, line in (
        ("R14", 5, "there is none for 'layer1.1'"),
        ("R8", 6, "there is none for 'heads.5.0.0.conv2'"),
        ("R8", 4, "this one has no 'heads.4.0.0.conv1'"),
    ):
        with pytest.raises(UserError, match=line):
            freeze(build_classifier(arch, "digits", heads), CPU, "int8", scales=scales)
    scales.shifts["conv1"] = torch.zeros(3)
    with pytest.raises(UserError, match="'conv1' has 16 channels, not 3"):
        freeze(classifier, CPU, "int8", scales=scales)
    del scales.shifts["conv1"]
    with pytest.raises(UserError, match="there is no shift of 'conv1'"):
        freeze(classifier, CPU, "int8", scales=scales)
    with pytest.raises(ValueError, match="int8 needs scales"):
        freeze(classifier, CPU, "int8")


def test_scales_go_through_a_file_and_damaged_ones_do_not():
    _, scales, _ = digits(1)
    held = scales.to_file()
    assert Scales.from_file(held).sha256 == scales.sha256
    for changed in (
        {"peaks": {"conv1": math.nan}},
        {"peaks": {"conv1": -1.0}},
        {"shifts": {"conv1": torch.tensor([math.inf])}},
        {"shifts": [1]},
        {"noise_sd": None},
        {"noise_sd": math.nan},
        {"peaks": {"conv1": 1e300}},
        {"images": math.inf},
    ):
        with pytest.raises(ValueError, match="scales of int8"):
            Scales.from_file(held | changed)
    del held["images"]
    with pytest.raises(ValueError, match="incomplete"):
        Scales.from_file(held)
    other = copy.deepcopy(scales)
    other.shifts["conv1"][0] += 1e-3
    assert other.sha256 != scales.sha256
