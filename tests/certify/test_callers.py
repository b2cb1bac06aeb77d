"""What a call from Python leaves of its caller's modules and settings, in threads, too."""

import threading

import pytest
import torch
from torch import nn

from spacte import certify_dataset
from spacte.model.modes import restore_mode_and_device

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_callers_module_gets_its_mode_back(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 10)).train()
    network[1].eval()
    modes = [one.training for one in network.modules()]
    data = (IMAGES, torch.arange(4))
    certify_dataset(network, data, noise_sd=0.25, num_classes=10, N0=10, N=20, device="cpu", logs_dir=tmp_path)
    assert [one.training for one in network.modules()] == modes
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(KeyboardInterrupt), restore_mode_and_device(network):
        network.eval()
        raise KeyboardInterrupt
    assert network.training


class Merging(nn.Linear):
    """As adapters of low rank do: in eval mode the weights hold what else is added at each call."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += -1.0 if mode else 1.0
        return super().train(mode)


def test_a_module_that_acts_when_its_mode_changes_is_told_so():
    network = nn.Sequential(nn.Flatten(), Merging(192, 10)).train()
    before = network[1].weight.clone()
    with restore_mode_and_device(network):
        network.eval()
    assert network[1].training and torch.allclose(network[1].weight, before, atol=1e-6)


def test_calls_in_threads_take_turns(tmp_path):
    """Else one would vote by the other's arithmetic, or in the mode into which the other has put their module."""
    network, seen, ends = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).train(), [], []
    data = (IMAGES, torch.arange(4))
    own = {"noise_sd": 0.25, "num_classes": 10, "N0": 10, "N": 20, "device": "cpu", "logs_dir": tmp_path}
    started = threading.Event()

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            seen.append((threading.current_thread().name, network.training, torch.get_float32_matmul_precision()))
            if not started.is_set():
                started.set()
                other.start()
                other.join(0.5)  # it has time to do harm
                assert other.is_alive()
            return network(images)

    def call(name):
        certify_dataset(Watched(), data, name=name, **own)
        ends.append((name, network.training))

    other = threading.Thread(target=call, args=("second",), name="second")
    torch.set_float32_matmul_precision("medium")
    try:
        call("first")
        other.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    names = [name for name, _, _ in seen]
    assert names == sorted(names, key=lambda name: name == "second"), "not in turns"
    assert set(seen) == {(name, False, "highest") for name in ("MainThread", "second")}
    assert dict(ends).keys() == {"first", "second"} and network.training
