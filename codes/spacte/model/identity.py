"""What tells a classifier from another one: hashes of its parameters, and of its layers."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


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
            plain = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
            values = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
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
