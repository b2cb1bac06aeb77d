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
    attempts = []

    def fails(stage, inputs):
        attempts.append(len(inputs))
        raise RuntimeError("operation not permitted when stream is capturing\nfurther lines")

    monkeypatch.setattr(passes_module, "Graph", fails)
    frozen, images = freeze(build_classifier("R8", "digits", 2), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    expected, classes = frozen(images), frozen.classes(images, 10)
    frozen.forget_functions()
    frozen.is_graph = True
    assert torch.equal(frozen(images), expected) and torch.equal(frozen.classes(images, 10), classes)
    assert attempts == [4, 4], "once for the logits and once for the classes, not in every pass"
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


class SameMemory:
    """In place of a CUDA graph, which writes each pass to the memory of the one before; large passes do not fit."""

    made, limit = 0, 100

    def __init__(self, stage, inputs):
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError
        SameMemory.made += 1
        self.stage, self.results = stage, stage(inputs.clone())

    def __call__(self, inputs):
        for own, found in zip(self.results, self.stage(inputs), strict=True):
            own.copy_(found)
        return self.results


@torch.inference_mode()
def test_a_graphs_passes_are_kept_although_the_next_one_writes_to_their_memory(monkeypatch):
    monkeypatch.setattr(passes_module, "Graph", SameMemory)
    monkeypatch.setattr(SameMemory, "made", 0)
    frozen, images = freeze(build_classifier("R8", "digits", 2), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    expected, classes = frozen(images), frozen.classes(images, 10)
    frozen.forget_functions()
    frozen.is_graph = True
    assert torch.equal(frozen(images), expected) and torch.equal(frozen.classes(images, 10), classes)
    assert SameMemory.made == 2


@torch.inference_mode()
def test_a_graph_that_memory_is_too_short_for_is_captured_of_a_smaller_pass(monkeypatch, capsys, recwarn):
    monkeypatch.setattr(passes_module, "Graph", SameMemory)
    monkeypatch.setattr(SameMemory, "made", 0)
    monkeypatch.setattr(SameMemory, "limit", 2)
    frozen, images = freeze(build_classifier("R8", "digits", 2), CPU, batch_size=4), torch.rand(9, 1, 8, 8)
    expected = frozen(images)
    frozen.forget_functions()
    frozen.is_graph = True
    torch.testing.assert_close(frozen(images), expected)
    assert SameMemory.made == 1 and not recwarn
    assert capsys.readouterr().err == "the GPU's memory is short: from here on 2 images per pass\n"


class Times(passes_module.FixedPasses):
    """Two stages, one of them with a setting."""

    def logits(self, images):
        return images.unsqueeze(0)

    def times(self, images, factor):
        return factor * images.unsqueeze(0)

    def halved(self, images, divisor):
        return images.unsqueeze(0) / divisor


@torch.inference_mode()
@pytest.mark.parametrize("is_graph", [False, True])
def test_what_runs_a_pass_is_of_its_stage_its_settings_and_its_shape(monkeypatch, is_graph):
    monkeypatch.setattr(passes_module, "Graph", SameMemory)
    one, images = Times(CPU, 8, compiled=False), torch.rand(9, 1, 2, 2)
    one.is_graph = is_graph
    assert torch.equal(one(images)[0], images) and torch.equal(one.logits_of_few(images)[0], images)
    for factor in (2, 4):
        for stage, expected in ((one.times, factor * images), (one.halved, images / factor)):
            assert torch.equal(one.run_in_passes(stage, images, factor)[0][0], expected)
    assert one(torch.rand(9, 1, 3, 3)).shape == (1, 9, 1, 3, 3)


@torch.inference_mode()
def test_another_error_of_a_network_is_the_users_and_halves_nothing():
    frozen = freeze(build_classifier("R8", "digits", 2), CPU, batch_size=64)

    def fails(module, inputs):
        raise RuntimeError("another reason")

    frozen.network.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="another reason"):
        frozen(torch.rand(9, 1, 8, 8))
    assert frozen.max_pass_size == 64
