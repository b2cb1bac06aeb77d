"""A classifier of the user's own, and the function in a file that builds it.

FILE.py:function -> module or callable -> ForeignClassifier: images [N, C, H, W] in [0, 1] -> logits [L, N, K]
"""

import ast
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spacte.device import memory_is_short
from spacte.model.modes import switch_to_eval
from spacte.model.passes import FixedPasses
from spacte.names import printable_name
from spacte.precision import autocast
from spacte.utils import FOREIGN_ERRORS, RunError, UserError, failure, listed


class ForeignClassifier(FixedPasses):
    """A user's module or callable, images [N, C, H, W] -> logits [N, K] or [L, N, K], as a classifier in fixed passes.

    A module is moved to the device and put into eval mode if it is not there already; another callable has its networks
    where it wants, and finds its images on the device. `precision` "bf16" is torch.autocast. With `copies` it gets
    a copy of the images, which it may overwrite. `compiled` makes torch forget all that the process has compiled.
    """

    def __init__(self, function: Callable, device: torch.device, precision: str, batch_size: int, compiled: bool):
        super().__init__(device, batch_size, compiled)
        if isinstance(function, nn.Module):
            _prepare(function, device)
        if compiled:
            torch.compiler.reset()  # its weights are constants of what was compiled of it before they changed
        self._function = (function,)  # no submodule: an exported program has no eval() for it
        self.precision = precision
        self.copies = False

    @property
    def function(self) -> Callable[[Tensor], Any]:
        """The user's."""
        return self._function[0]

    def forward(self, images: Tensor) -> Tensor:
        """See FixedPasses. Raises UserError if the user's function fails, in one line."""
        try:
            return super().forward(images)
        except (UserError, RunError):
            raise
        except FOREIGN_ERRORS as error:
            if memory_is_short(error):
                raise
            advice = _advice(self.function)
            raise UserError(f"the classifier fails on images {list(images.shape)}: {failure(error)}{advice}") from error

    def logits(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [L, N, K], float32. Raises UserError if that is not what the user's function returns."""
        with autocast(self.device, self.precision):
            logits = self.function(images.clone() if self.copies else images)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() not in (2, 3):
            raise UserError(f"the classifier returned {_describe(logits)}: it must return {_LEGAL}{_where_in(logits)}")
        if logits.shape[-2] != len(images):
            raise UserError(
                f"the classifier returned {_describe(logits)} for {len(images)} images: they must be {_LEGAL}"
            )
        return logits.float() if logits.dim() == 3 else logits.float().unsqueeze(0)


def _prepare(module: nn.Module, device: torch.device) -> None:
    """Move a module to the device and put it into eval mode, where that changes anything.

    Scripted, frozen, exported and quantised modules lack some of nn.Module's methods: none is called without need, and
    what cannot be switched is left to the checks of the contract.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise UserError("the classifier's parameters have no values, they are on the meta device: load its weights")
    if len({tensor.device for tensor in tensors}) == 1 and tensors[0].device != device:  # not one on several devices
        module.to(device)
    switch_to_eval(module)


_LEGAL = "logits, floating point, [N, K] or [L, N, K] for N images"


def _where_in(value: Any) -> str:
    """Where the logits may be in what a function returned."""
    if isinstance(getattr(value, "logits", None), Tensor):
        return ": return its .logits"
    places = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, tuple | list) else ())
    found = [key for key, one in places if isinstance(one, Tensor) and one.is_floating_point() and one.dim() == 2]
    return f": return its [{found[0]!r}]" if found else ""


def _advice(function: Callable) -> str:
    """What to do about a failure, where the function's kind tells."""
    tensors = [*function.parameters()] if isinstance(function, nn.Module) else []
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - {torch.float32}
    if not kinds:
        return ""
    kind = str(kinds.pop()).removeprefix("torch.")
    return f"; its parameters are {kind}, the images float32: return module.float(), or a function that converts both"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


class _AsItIs(SourceFileLoader):
    """Loads a file from its source, never from cached bytecode. Python tells whether bytecode is up to date by size and
    modification time in whole seconds: the log could hold the SHA-256 of a version that did not run.
    """

    def path_stats(self, path: str) -> Mapping[str, Any]:
        """Nothing, so that no bytecode is looked for or left."""
        raise OSError("no bytecode")


def build(name: str, arguments: dict) -> Callable:
    """What FILE.py:function returns, called with the arguments by name: a module, or another callable.

    The file's folder comes first where it imports, as in a script. Raises UserError with the file and the line where
    the file or the function is missing, fails or returns something else.
    """
    path, function = file_and_function(name)
    if not path.is_file():
        raise UserError(f"--classifier {name}: there is no file '{path}'")
    spec: Any = importlib.util.spec_from_file_location(path.stem, path, loader=_AsItIs(path.stem, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickle look for it there
    try:
        spec.loader.exec_module(module)
    except FOREIGN_ERRORS as error:
        raise UserError(f"--classifier {name}: {failure(error)}") from error
    finally:
        if before is not None:  # a file called torch.py, say, must not replace the real torch
            sys.modules[path.stem] = before
    builder = getattr(module, function, None)
    if not callable(builder):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UserError(f"--classifier {name}: '{path}' has no function '{function}'; it has {listed(there) or 'none'}")
    try:
        wanted = inspect.signature(builder)
    except ValueError as error:
        raise UserError(f"--classifier {name}: '{function}' is not a Python function") from error
    try:
        wanted.bind(**arguments)
    except TypeError as error:
        raise UserError(f"--classifier {name}: {error}; --classifier_args must fit {function}{wanted}") from error
    try:
        classifier = builder(**arguments)
    except FOREIGN_ERRORS as error:
        raise UserError(f"--classifier {name}: {failure(error)}") from error
    if not callable(classifier):
        raise UserError(
            f"--classifier {name}: {function} returned {_describe(classifier)}: it must return a module or a callable"
        )
    return classifier


def file_and_function(name: str) -> tuple[Path, str]:
    """The two parts of FILE.py:function. UserError if it is not that."""
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"--classifier {name}: it must be FILE.py:function")
    return Path(file), function


def run_name(function: str, arguments: dict) -> str:
    """What the run is called: the function, then its arguments; of a text, such as a file's path, only the stem."""
    values = {key: Path(value).stem if isinstance(value, str) else value for key, value in arguments.items()}
    return printable_name("-".join([function, *(f"{key}-{value}" for key, value in values.items())]))


def parse_arguments(texts: tuple[str, ...]) -> dict:
    """The arguments key=value by name; a value is a Python literal (3, 0.5, True, None, 'text', [1, 2]) or else text.

    Raises UserError if one is not of that form or comes twice.
    """
    arguments = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            raise UserError(f"--classifier_args {text}: each must be key=value, with a key of its own")
        arguments[key] = _literal(value)
    return arguments


def files_in(arguments: dict) -> dict[str, Path]:
    """The files that arguments name, by argument."""
    texts = {name: value for name, value in arguments.items() if isinstance(value, str)}
    return {name: Path(text) for name, text in texts.items() if os.path.isfile(text)}


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
