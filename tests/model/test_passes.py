"""Passes of one shape: their size, measured on a CPU and halved on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from spacte.model import build_classifier, pass_size
from spacte.model import passes as passes_module
from spacte.model.frozen import freeze
from spacte.model.members import NetworkEnsemble

CPU = torch.device("cpu")


def test_passes_have_one_shape_that_fits(monkeypatch):
    monkeypatch.setattr(passes_module, "CPU_PIXELS", 3000)
    frozen, seen = freeze(build_classifier("R8", "digits", 1), CPU, batch_size=100), []
    frozen.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.inference_mode():
        assert frozen(torch.rand(70, 1, 8, 8)).shape == (1, 70, 10)
    assert seen == [34, 34, 34]  # ceil(100 / ceil(100 * 64 / 3000)), at most 3000 pixels each


CLOCK = [0.0]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(pass_size, "time", SimpleNamespace(perf_counter=lambda: CLOCK[0]))
    monkeypatch.setattr(pass_size, "_SECONDS_OF_MEASURING", 0)


class Slow(passes_module.FixedPasses):
    """Fast in passes of 25 images alone, by a clock that it moves."""

    def logits(self, images):
        self.seen = len(images)
        CLOCK[0] += 0.0001 * len(images) * (1 if len(images) == 25 else 3)
        return torch.zeros(2, len(images), 10)


def test_the_fastest_pass_is_measured_without_compiling(monkeypatch, clock):
    """Although what has run before is compiled."""
    monkeypatch.setattr(
        passes_module, "_compiled", lambda stage, device: lambda images: calls.append(1) or stage(images)
    )
    slow, calls = Slow(CPU, 100, compiled=True), []
    with torch.inference_mode():
        slow(torch.rand(10, 3, 32, 32))
    assert len(calls) == 1
    pass_size.fastest_pass_size(slow, torch.rand(3, 32, 32))
    assert len(calls) == 1


def test_the_fastest_pass_is_measured_and_fixed(clock):
    slow, small = (Slow(CPU, size, compiled=False) for size in (100, 50))
    assert (
        pass_size.fastest_pass_size(slow, torch.rand(3, 32, 32)) == 25 and slow.pass_size(torch.rand(3, 32, 32)) == 100
    )
    assert pass_size.fastest_pass_size(small, torch.rand(3, 32, 32)) == 50 and not hasattr(small, "seen"), "fits anyway"
    long = Slow(CPU, 100, compiled=False)
    assert pass_size.fastest_pass_size(long, torch.rand(4096)) == 25, "signals are as large as images of as many values"
    both = NetworkEnsemble([slow, Slow(CPU, 20, compiled=False)])
    pass_size.set_pass_size(both, 25)
    with torch.inference_mode():
        both(torch.rand(60, 3, 32, 32))
    assert [one.seen for one in both.networks] == [25, 20], "never more than a batch"


@torch.inference_mode()
def test_a_pass_that_cannot_be_captured_runs_as_it_is(monkeypatch, recwarn):
    def fails(stage, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nfurther lines")

    monkeypatch.setattr(passes_module, "Graph", fails)
    frozen, images = freeze(build_classifier("R8", "digits", 2), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    expected, classes = frozen(images), frozen.classes(images, 10)
    frozen.forget_functions()
    frozen.is_graph = True
    assert torch.equal(frozen(images), expected) and torch.equal(frozen.classes(images, 10), classes)
    (line,) = {str(one.message) for one in recwarn}
    assert line.startswith("a pass that cannot become a CUDA graph runs as it is") and line.endswith(
        "when stream is capturing"
    )


@torch.inference_mode()
def test_passes_are_halved_while_memory_is_short(capsys):
    frozen, images = freeze(build_classifier("R8", "digits", 2), CPU, batch_size=64), torch.rand(64, 1, 8, 8)
    expected, limit = frozen(images), 10

    def run_out_of_memory(module, inputs):
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError

    frozen.network.register_forward_pre_hook(run_out_of_memory)
    assert torch.equal(frozen(images), expected) and torch.equal(frozen(images), expected)
    assert capsys.readouterr().err == "the GPU's memory is short: from here on 8 images per pass\n"
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        frozen(images)
