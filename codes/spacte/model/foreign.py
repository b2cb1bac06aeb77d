"""A classifier of the user's own: the function in a file that builds it, and what identifies it.

FILE.py:function -> module or callable -> Foreign: images [N, C, H, W] in [0, 1] -> logits [L, N, K]
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from spacte.device import autocast, memory_is_short
from spacte.model.passes import FixedPasses
from spacte.names import printable_name
from spacte.utils import FOREIGN_ERRORS, RunError, UserError, failure, listed


class Foreign(FixedPasses):
    """A user's module or callable, images [N, C, H, W] -> logits [N, K] or [L, N, K], as a classifier in fixed passes.

    A module is moved to the device and put into eval mode if it is not there already; another callable has its networks
    where it wants, and finds its images on the device. `precision` "bf16" is torch.autocast. With `copies` it gets
    images of its own, in which it may compute. `compiled` makes torch forget all that the process has compiled.
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
            raise UserError(f"the classifier returned {_described(logits)}: it must return {_LEGAL}{_where_in(logits)}")
        if logits.shape[-2] != len(images):
            raise UserError(
                f"the classifier returned {_described(logits)} for {len(images)} images: they must be {_LEGAL}"
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


def switch_to_eval(module: nn.Module) -> None:
    """Put a module into eval mode where it is not there already."""
    if any(getattr(one, "training", False) for one in module.modules()):
        with contextlib.suppress(NotImplementedError):  # an exported program's mode was fixed when it was exported
            module.eval()


class _Lent:
    """How a module was before it was borrowed first, and by how many it is."""

    def __init__(self, module: nn.Module):
        self.module, self.borrowers = module, 0
        self.modes = [(one, one.training) for one in module.modules() if hasattr(one, "training")]
        self.devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}

    def give_back(self) -> None:
        """Its mode and its device."""
        for one, mode in self.modes:  # a module before its parts: some merge weights when the mode changes
            if one.training != mode:
                try:
                    one.train(mode)
                except Exception as error:  # a user's, or an exported program's
                    warnings.warn(f"a module did not go back into its mode: {failure(error)}", stacklevel=2)
                one.training = mode
        if len(self.devices) == 1 and {tensor.device for tensor in self.module.parameters()} - self.devices:
            self.module.to(self.devices.pop())


_LENT: dict[int, _Lent] = {}
_LENDING = threading.Lock()


@contextlib.contextmanager
def borrowed(function: object) -> Iterator[None]:
    """A module of the caller's gets back its mode and its device at the end; another callable is left alone.

    Of several calls that overlap, in threads say, the last gives them back. A module within another one counts as its
    own: two that share it may change it under each other.
    """
    if not isinstance(function, nn.Module):
        yield
        return
    with _LENDING:
        lent = _LENT.setdefault(id(function), _Lent(function))
        lent.borrowers += 1
    try:
        yield
    finally:
        with _LENDING:
            lent.borrowers -= 1
            if not lent.borrowers:
                del _LENT[id(function)]
                lent.give_back()


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


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


class _AsItIs(SourceFileLoader):
    """Runs a file as it is now. Kept bytecode may be of another version, for it is told by size and second alone: the
    log would hold the SHA-256 of a file that did not run.
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
            f"--classifier {name}: {function} returned {_described(classifier)}: it must return a module or a callable"
        )
    return classifier


def file_and_function(name: str) -> tuple[Path, str]:
    """The two parts of FILE.py:function. UserError if it is not that."""
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"--classifier {name}: it must be FILE.py:function")
    return Path(file), function


def run_name(function: str, arguments: dict) -> str:
    """What the run is called: the function, then its arguments; of a file, its name alone."""
    values = {key: Path(value).stem if isinstance(value, str) else value for key, value in arguments.items()}
    return printable_name("-".join([function, *(f"{key}-{value}" for key, value in values.items())]))


def parsed_arguments(texts: tuple[str, ...]) -> dict:
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


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def parameters_sha256(classifier: Callable) -> str | None:
    """A hash of all parameters and buffers of the modules and tensors that a classifier holds; None where none is seen.

    Seen are a module, and what another callable has in its attributes, its closure, the global variables that it names
    (functions of its file, lists and dicts too) and its arguments bound by functools.partial.
    """
    digest, held = hashlib.sha256(), list(_held(classifier))
    for one in held:
        named = [("", one)] if isinstance(one, Tensor) else [*one.named_parameters(), *one.named_buffers()]
        for name, tensor in named:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().tobytes() if len(values) else b"")
    return digest.hexdigest() if held else None


def structure_sha256(module: nn.Module) -> str:
    """A hash of a module's layers, with their settings, of how many hooks they have, of parameters and buffers."""
    hooks = [
        len(one._forward_pre_hooks) + len(one._forward_hooks) + ("forward" in vars(one)) for one in module.modules()
    ]
    return hashlib.sha256(f"{module} {hooks} {parameters_sha256(module)}".encode()).hexdigest()


def _constants(module: torch.jit.ScriptModule) -> list[Tensor]:
    """The tensors in a scripted module's code, where a frozen one has its weights."""
    graph: Any = module.inlined_graph  # held while its nodes are read
    nodes = graph.findAllNodes("prim::Constant")
    return [node.t("value") for node in nodes if node.hasAttribute("value") and node.kindOf("value") == "t"]


def _held(value: Any, depth: int = 4) -> Iterator[nn.Module | Tensor]:
    """The modules and tensors that a value is or reaches within `depth` steps."""
    if isinstance(value, nn.Module | Tensor):
        yield value
        if isinstance(value, torch.jit.ScriptModule):
            yield from _constants(value)
        return
    parts: Iterable[Any] = ()
    if isinstance(value, list | tuple | dict):
        parts = value.values() if isinstance(value, dict) else value
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        parts = [value.__self__, value.__func__]
    elif inspect.isfunction(value):
        around = inspect.getclosurevars(value)
        near = [one for one in around.globals.values() if not inspect.isfunction(one) or _same_file(one, value)]
        parts = [*around.nonlocals.values(), *near, *vars(value).values()]
    elif not isinstance(value, type | ModuleType):
        parts = getattr(value, "__dict__", {}).values()
    for part in parts if depth else ():
        yield from _held(part, depth - 1)


def _same_file(one: Callable, other: Callable) -> bool:
    return one.__code__.co_filename == other.__code__.co_filename
