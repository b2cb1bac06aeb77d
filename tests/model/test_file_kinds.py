"""What is no checkpoint is told from its first bytes, with what its owner can do."""

import io
import pickle
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spacte.model.checkpoint import load_classifier
from spacte.utils import UserError


def module_file(path):
    """A module whose class is code of somebody else's."""
    theirs = types.ModuleType("their_code")
    theirs.MyNet = type("MyNet", (nn.Linear,), {"__module__": "their_code"})
    sys.modules["their_code"] = theirs
    torch.save(theirs.MyNet(2, 2), path)
    del sys.modules["their_code"]


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"), io.BytesIO(b""))


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.md", "hello")


def cut_zip(path):
    torch.save(nn.Linear(100, 100).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def cut_legacy(path):
    torch.save(nn.Linear(100, 100).state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:100])


def old_module(path):
    """In torch's format of before 1.6, and larger than what is read of a file."""
    theirs = types.ModuleType("their_code")
    theirs.MyNet = type("MyNet", (nn.Linear,), {"__module__": "their_code"})
    sys.modules["their_code"] = theirs
    torch.save(theirs.MyNet(1500, 1500), path, _use_new_zipfile_serialization=False)
    del sys.modules["their_code"]


def old_optimiser(path):
    """A whole file, whose objects torch would not read without running code."""
    network = nn.Linear(2, 2)
    contents = {"state_dict": network.state_dict(), "opt": torch.optim.SGD(network.parameters(), 0.1)}
    torch.save(contents, path, _use_new_zipfile_serialization=False)


def cut_old_tensors(path):
    torch.save(nn.Linear(100, 100).state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])


def large_pickle(path):
    path.write_bytes(pickle.dumps({"w": np.zeros((1500, 1500)), "v": np.ones(3)}))


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(2))


def npy(path):
    with open(path, "wb") as file:
        np.save(file, np.ones(2))


def exported(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.rand(1, 2),)), path)


KINDS = {
    "empty": (lambda path: path.write_bytes(b""), "is empty: copy or download it again"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "is a web page, not a checkpoint: the download"),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "is a Git LFS pointer, not the file that it points to: run git lfs pull",
    ),
    "module": (module_file, r"holds pickled objects \(their_code.MyNet\), which are code and are not run here: where"),
    "old module": (old_module, r"holds pickled objects \(their_code.MyNet\), which are code"),
    "old optimiser": (old_optimiser, "is a pickle without a state dict: where its code is"),
    "cut old tensors": (cut_old_tensors, "is truncated or damaged: copy or download it again"),
    "large pickle": (large_pickle, "is a pickle without a state dict: where its code is"),
    "torch module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"holds pickled objects \(torch.nn.modules.linear",
    ),
    "script": (
        lambda path: torch.jit.script(nn.Linear(2, 2)).save(path),
        "is a TorchScript archive: certify it as your",
    ),
    "export": (exported, "is a torch.export program: certify it as your own function"),
    "safetensors": (lambda path: save_file({"a": torch.ones(2)}, path), "is a safetensors file: torch.save"),
    "tar": (tarred, "is a tar archive: unpack it"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(20)), "is a gzip archive: unpack it"),
    "zip": (zipped, r"is a zip archive \(readme.md\): unpack it"),
    "npz": (npz, "is an .npz file of numpy arrays"),
    "npy": (npy, "is a numpy array, not a file of torch.save"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20)), r"is an HDF5 file \(Keras\?\)"),
    "onnx": (
        lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(20)),
        "is an ONNX file: .*onnx_runtime.py",
    ),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n" + bytes(20)), "is a picture"),
    "text": (lambda path: path.write_text("idx\tlabel\n"), "is a text file, which begins with 'idx\tlabel'"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": print})), "is a pickle without a state dict"),
    "cut zip": (cut_zip, "is truncated: its copy or download is not complete"),
    "cut legacy": (cut_legacy, "is truncated or damaged: copy or download it again"),
    "noise": (
        lambda path: path.write_bytes(bytes(range(200, 240))),
        r"is not a file of torch.save \(it begins with the",
    ),
    "scores": (
        lambda path: torch.save({"accuracy": 0.9}, path),
        "is a foreign file: a checkpoint holds a 'state_dict', this accuracy; .*my.py:build",
    ),
    "folder": (
        lambda path: (path.mkdir(), torch.save({}, path / "best.pth.tar")),
        "is a folder, not a checkpoint: there are '.*best.pth.tar'",
    ),
    "empty folder": (lambda path: path.mkdir(), "is a folder, not a checkpoint: there is no .pth in it"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_is(tmp_path, kind):
    make, message = KINDS[kind]
    make(tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"'.*file.pth' .*" + message) as refused:
        load_classifier(tmp_path / "file.pth", dataset="CIFAR10")
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_reading_runs_no_code(tmp_path):
    """A pickle that would write a file names what it would call, and does not call it."""
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save({"state_dict": Evil()}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="pickle"):
        load_classifier(tmp_path / "file.pth", dataset="CIFAR10")
    assert not trace.exists()
