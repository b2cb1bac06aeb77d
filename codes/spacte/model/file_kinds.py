"""What a file is that is no checkpoint, told from its first bytes, and what its owner can do with it."""

import io
import json
import pickletools
import re
import zipfile
from collections import deque
from pathlib import Path

from spacte.utils import listed

_ARCHIVES = {
    b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}  # fmt: skip
_OTHERS = {
    b"\x89HDF": "an HDF5 file (Keras?)",
    b"\x93NUMPY": "a numpy array",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"%PDF": "a PDF document",
}
_SAVE = "where its code is, save torch.save({'state_dict': model.state_dict()}, file)"
_ENOUGH = 2**22  # bytes of a pickle: what tells its kind stands before its arrays
_OF_TENSORS = r"torch\.(_utils\._rebuild_\w+|\w*Storage|Size|device|nn\.parameter\.Parameter)|collections\.OrderedDict"
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in torch's format of before 1.6
_TORCH = ("torch", "collections", "numpy", "builtins", "_codecs", "copyreg", "__builtin__")


def folder_line(path: Path) -> str:
    """What to say of a folder that was given as a checkpoint: which of its files may be one."""
    near = (one for pattern in ("*.pt*", "*/*.pt*", "*/*/*.pt*") for one in path.glob(pattern))  # not all of a disk
    files = [f"'{one}'" for one in sorted(near) if one.is_file()]
    there = f"there are {listed(files, 5)}" if files else "there is no .pth in it"
    return f"'{path}' is a folder, not a checkpoint: {there}"


def describe_file(path: Path) -> str:
    """What the file is, and what to do, as the end of a sentence that begins with its name."""
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if not head:
        return "is empty: copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file that it points to: run git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a checkpoint: the download gave a page to confirm or to log in"
    if head.startswith(b"PK"):
        return _zip(path)
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"is a {name} archive: unpack it and give the file in it"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it and give the file in it"
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            return f"is {name}, not a file of torch.save"
    if _is_safetensors(head, path):
        return (
            "is a safetensors file: torch.save({'state_dict': safetensors.torch.load_file(file)}, other) makes it a "
            "checkpoint"
        )
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b":"):
        return "is an ONNX file: certify it as your own function, see codes/examples/onnx_runtime.py"
    if head[:1] == b"\x80":
        with open(path, "rb") as file:
            return _pickle(file.read(_ENOUGH), whole=path.stat().st_size <= _ENOUGH)
    if all(9 <= byte < 127 for byte in head):
        return f"is a text file, which begins with '{head[:40].decode(errors='replace').splitlines()[0].strip()}'"
    return f"is not a file of torch.save (it begins with the bytes {head[:8].hex(' ')})"


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.split("/", 1)[-1] for name in archive.namelist()]
            pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            content = archive.read(pickled) if pickled else b""
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        return "is truncated: its copy or download is not complete"
    if any(name.startswith("code/") or name == "constants.pkl" for name in names):
        return "is a TorchScript archive: certify it as your own function, which returns torch.jit.load(file)"
    if any(name.endswith(("exported_program.json", "archive_format", "models/model.json")) for name in names):
        return (
            "is a torch.export program: certify it as your own function, which returns torch.export.load(file).module()"
        )
    if content:
        return _pickle(content)
    if any(name.endswith(".npy") for name in names):
        return "is an .npz file of numpy arrays, not of torch.save"
    return f"is a zip archive ({listed(names, 3)}): unpack it and give the file in it"


def _pickle(content: bytes, whole: bool = True) -> str:
    """Of a pickle, `whole` or its beginning: the classes that it would make, read without making them."""
    names, is_old, ends = _imports(content)
    strange = [name for name in names if name.split(".")[0] not in _TORCH or ".nn." in name]
    if strange:
        return f"holds pickled objects ({listed(strange, 3)}), which are code and are not run here: {_SAVE}"
    of_tensors = all(re.fullmatch(_OF_TENSORS, name) for name in names)
    if (whole and not ends) or (is_old and of_tensors):
        return "is truncated or damaged: copy or download it again"
    return f"is a pickle without a state dict: {_SAVE}"


def _imports(content: bytes) -> tuple[list[str], bool, bool]:
    """What a pickle would import; whether it is torch's format of before 1.6, four pickles and then the tensors; and
    whether it has its end.

    Names are text on the pickle's stack; a name that occurs again is fetched from its memo.
    """
    found, pickles, is_old, file = dict[str, None](), 1, False, io.BytesIO(content)
    while pickles:
        memo, texts, top, pickles = dict[int, str | None](), deque[str](maxlen=2), None, pickles - 1
        try:
            for operation, argument, _ in pickletools.genops(file):
                name = operation.name
                if name == "GLOBAL":
                    found[str(argument).replace(" ", ".")] = None
                elif name == "STACK_GLOBAL":
                    found[".".join(texts)] = None
                elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                    memo[len(memo) if argument is None else int(argument)] = top
                    continue  # which leaves the stack as it is
                elif argument == _OLD_MAGIC:
                    pickles, is_old = 3, True
                if name in ("GET", "BINGET", "LONG_BINGET"):
                    top = memo.get(int(argument or 0))
                else:
                    top = argument if name != "GLOBAL" and isinstance(argument, str) else None
                texts.extend([] if top is None else [top])
        except Exception:  # pickletools raises whatever the damage happens to trigger
            return list(found), is_old, False
    return list(found), is_old, True


def _is_safetensors(head: bytes, path: Path) -> bool:
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or not 2 <= length <= path.stat().st_size - 8:
        return False
    with open(path, "rb") as file:
        file.seek(8)
        try:
            return isinstance(json.loads(file.read(length)), dict)
        except ValueError:
            return False
