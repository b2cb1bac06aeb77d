"""The file of a checkpoint: written whole, read without running its code, whoever wrote it."""

import hashlib
import io
import pickle
import warnings
from argparse import Namespace
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch

from spacte.data.spec import DataSpec
from spacte.files import replace_file
from spacte.model.file_kinds import described, folder_line
from spacte.model.published import CONTAINERS, state_dict_of, way_out
from spacte.utils import UserError, listed


def save(path: Path, contents: dict) -> None:
    """Write a checkpoint so that `path` never holds half of one; its DataSpec under "data" becomes a dict.

    Equal contents make equal files: no name of a temporary file gets into them. UserError if it cannot be written, or
    could not be read again because it holds more than tensors, numbers, strings and containers of them.
    """
    contents = {**contents, "data": asdict(contents["data"])}
    others = {name: value for name, value in contents.items() if name not in _OF_TORCH}
    if not _is_readable(others):
        strange = _strange(others)
        raise UserError(
            f"'{path}' could not be read again: {strange} is no tensor, number, string, list or dict of them"
        )
    replace_file(path, _written(contents).getbuffer())


_OF_TORCH = ("state_dict", "optimizer", "scheduler")  # large, and always readable


def _written(contents: Any) -> io.BytesIO:
    buffer = io.BytesIO()  # not the file: of a full disk torch's writer says only that its position is unexpected
    torch.save(contents, buffer)
    return buffer


def _is_readable(contents: Any) -> bool:
    """Whether `read` could load a file of these contents."""
    buffer = _written(contents)
    buffer.seek(0)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def _strange(contents: Any, name: str = "it") -> str:
    """The name of the innermost value in nested dicts that could not be read again."""
    for key, value in contents.items() if isinstance(contents, dict) else ():
        if not _is_readable(value):
            return _strange(value, f"{name}[{key!r}]".removeprefix("it"))
    return name


def read(path: Path | str) -> dict:
    """The contents of a checkpoint on the CPU, with its DataSpec rebuilt; never runs code from the file.

    A state dict may lie under any name in use, or be the whole file; it is under `state_dict` here, the names that lead
    to it in the file under `keys`, and the hash of what was read under `file_sha256`. Raises UserError that says what
    the file is if it is missing, truncated or holds no state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(folder_line(path))
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive, which is refused below
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # of this file, whatever takes its place meanwhile
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises whatever the damage happens to trigger
        raise UserError(
            f"'{path}' is not a readable checkpoint (truncated or foreign): it {described(path)}"
        ) from error
    found = state_dict_of(contents)
    if found is None:
        keys = [name for name in contents if state_dict_of(contents[name])] if isinstance(contents, dict) else []
        raise UserError(
            f"'{path}' is a foreign file: a checkpoint holds a 'state_dict', this {_summary(contents)}; "
            f"{way_out(path, tuple(keys[:1]))}"
        )
    others = [
        name for name in CONTAINERS if name in contents and name not in found[1] and state_dict_of(contents[name])
    ]
    if others:
        warnings.warn(
            f"'{path}' holds networks under {found[1][0]} and {', '.join(others)}: the first is taken", stacklevel=2
        )
    contents = dict(contents) if found[1] else {}
    contents["state_dict"], contents["keys"] = found
    contents["file_sha256"] = digest
    data = contents.pop("data", None)  # of another code where it is no dict
    if isinstance(data, dict):
        try:
            contents["data"] = DataSpec.from_file(data)
        except ValueError as error:
            raise UserError(f"'{path}' is a foreign file: its 'data' does not describe a data set") from error
    args = contents.setdefault("args", {})
    contents["args"] = args = vars(args) if isinstance(args, Namespace) else args
    if not isinstance(args, dict) and "data" not in contents:
        contents["args"] = {}  # of another code
    elif not isinstance(args, dict):
        raise UserError(f"'{path}' is a foreign file: its 'args' are not the settings of a run")
    return contents


# what people save beside the weights: scores as numpy's numbers and arrays, flags, paths
_NUMPY: Any = np._core.multiarray  # type: ignore[attr-defined]
_HARMLESS = [
    np.dtype, np.ndarray, (_NUMPY.scalar, "numpy.core.multiarray.scalar"), _NUMPY.scalar,
    (_NUMPY._reconstruct, "numpy.core.multiarray._reconstruct"), _NUMPY._reconstruct,
    *(kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and name != "ObjectDType"),
    Namespace, PosixPath, defaultdict,
]  # fmt: skip


def _summary(contents: Any) -> str:
    if not isinstance(contents, dict):
        return f"a {type(contents).__name__}"
    return listed(contents, 8) or "nothing"
