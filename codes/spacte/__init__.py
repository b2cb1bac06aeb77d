"""Multi-head smoothed classifiers with certified L2 robustness: one library for every base defence.

The public names below are imported when they are first asked for, so that reading a log loads no torch.
"""

import importlib

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


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'spacte' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})  # completion shows what has not been imported yet
