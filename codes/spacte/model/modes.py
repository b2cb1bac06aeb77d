"""The train and eval modes of a caller's modules: switched for votes, and given back."""

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

from spacte.utils import failure


def switch_to_eval(module: nn.Module) -> None:
    """Put a module into eval mode where it is not there already."""
    if any(getattr(one, "training", False) for one in module.modules()):
        with contextlib.suppress(NotImplementedError):  # an exported program's mode was fixed when it was exported
            module.eval()


@contextlib.contextmanager
def restore_mode_and_device(function: object) -> Iterator[None]:
    """A module of the caller's gets back its mode and its device at the end; another callable is left alone."""
    if not isinstance(function, nn.Module):
        yield
        return
    modes = [(one, one.training) for one in function.modules() if hasattr(one, "training")]
    devices = {tensor.device for tensor in (*function.parameters(), *function.buffers())}
    try:
        yield
    finally:
        for one, mode in modes:  # a module before its parts: some merge weights when the mode changes
            if one.training != mode:
                try:
                    one.train(mode)
                except Exception as error:  # a user's, or an exported program's
                    warnings.warn(f"a module did not go back into its mode: {failure(error)}", stacklevel=2)
                one.training = mode
        if len(devices) == 1 and {tensor.device for tensor in function.parameters()} - devices:
            function.to(devices.pop())
