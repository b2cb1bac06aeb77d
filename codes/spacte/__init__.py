"""Multi-head smoothed classifiers with certified L2 robustness: one library for every base defence.

The public names below are imported when they are first asked for, so that reading a log loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spacte.certify.dataset import certify_dataset as certify_dataset
    from spacte.data.sources import open_split as open_split
    from spacte.logs.certlog import average_certified_radius as average_certified_radius
    from spacte.logs.certlog import certified_accuracy as certified_accuracy
    from spacte.logs.certlog import read_log as read_log
    from spacte.model import build_classifier as build_classifier
    from spacte.model.checkpoint import load_classifier as load_classifier
    from spacte.model.frozen import freeze as freeze
    from spacte.smooth.smooth import Smooth as Smooth
    from spacte.train.objective import Objective as Objective
    from spacte.utils import UserError as UserError

_PUBLIC = {
    "Smooth": "spacte.smooth.smooth",
    "build_classifier": "spacte.model",
    "load_classifier": "spacte.model.checkpoint",
    "certify_dataset": "spacte.certify.dataset",
    "freeze": "spacte.model.frozen",
    "open_split": "spacte.data.sources",
    "Objective": "spacte.train.objective",
    "read_log": "spacte.logs.certlog",
    "average_certified_radius": "spacte.logs.certlog",
    "certified_accuracy": "spacte.logs.certlog",
    "UserError": "spacte.utils",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'spacte' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})  # completion shows what has not been imported yet
