"""A defence's objective and its loss, for the tests of several files."""

import torch
from conftest import load_module

from spacte.train.command import parse


def objective_of(defence, *flags):
    """The defence's objective on digits with the flags."""
    kind = getattr(load_module(defence, "train"), defence[1:])
    recipe, _, own = parse(kind, "", [str(flag) for flag in flags], lbdlast=1.0)
    return kind(recipe, 10, **own)


def call(objective, classifier):
    """(loss, parts) of the last epoch on eight random images, the same ones and the same draws each time."""
    torch.manual_seed(0)
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()  # attacks look at them
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    targets = (torch.rand(8, 10).softmax(1),) if objective.name() == "CATRS" else ()
    return objective(classifier, images, labels, 150, *targets)
