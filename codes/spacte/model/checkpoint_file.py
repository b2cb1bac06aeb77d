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
from torch import Tensor

from spacte.data.spec import DataSpec
from spacte.files import replace_file
from spacte.model.file_kinds import describe_file, folder_line
from spacte.model.published import CONTAINERS, how_to_certify_it, state_dict_of
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
    whole, sha256 = _loaded(path)
    tensors, keys = _state_dict(path, whole)
    contents = dict(whole) if keys else {}
    data = contents.pop("data", None)  # of another code where it is no dict
    if isinstance(data, dict):
        try:
            contents["data"] = DataSpec.from_file(data)
        except ValueError as error:
            raise UserError(f"'{path}' is a foreign file: its 'data' does not describe a data set") from error
    contents["args"] = _args(path, contents)
    return contents | {"state_dict": tensors, "keys": keys, "file_sha256": sha256}


def _loaded(path: Path) -> tuple[Any, str]:
    """What torch.save has written, and the hash of the file. UserError if it is no such file."""
    if path.is_dir():
        raise UserError(folder_line(path))
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive, which is refused below
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # of this file, whatever takes its place meanwhile
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True), digest
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises whatever the damage happens to trigger
        raise UserError(
            f"'{path}' is not a readable checkpoint (truncated or foreign): it {describe_file(path)}"
        ) from error


def _state_dict(path: Path, contents: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in a file, and the names that lead to it. UserError if there is none, a warning if several."""
    found = state_dict_of(contents)
    if found is None:
        names = [name for name in contents if state_dict_of(contents[name])] if isinstance(contents, dict) else []
        raise UserError(
            f"'{path}' is a foreign file: a checkpoint holds a 'state_dict', this {_summary(contents)}; "
            f"{how_to_certify_it(path, tuple(names[:1]))}"
        )
    tensors, keys = found
    others = [name for name in CONTAINERS if name in contents and name not in keys and state_dict_of(contents[name])]
    if others:
        warnings.warn(
            f"'{path}' holds networks under {keys[0]} and {', '.join(others)}: the first is taken", stacklevel=3
        )
    return tensors, keys


def _args(path: Path, contents: dict) -> dict:
    """The settings of a run; none in a file of another code. UserError if ours holds something else."""
    args = contents.get("args", {})
    args = vars(args) if isinstance(args, Namespace) else args
    if isinstance(args, dict):
        return args
    if "data" in contents:
        raise UserError(f"'{path}' is a foreign file: its 'args' are not the settings of a run")
    return {}


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
