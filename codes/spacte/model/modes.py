"""The train and eval modes of a caller's modules: switched for votes, and given back."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

from torch import nn

from spacte.utils import failure


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
