"""A defence's objective, its loss and its trainer, for the tests of several files."""

import torch
from conftest import load_module

from spacte.data.sources import open_split
from spacte.model import build_classifier
from spacte.train.command import parse
from spacte.train.trainer import Trainer


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


def trainer_of(defence, images, *flags):
    """A trainer of R8 on the first images of digits."""
    objective = objective_of(defence, *flags, "--dataset", "digits", "--arch", "R8")
    digits = open_split("digits", "", True)
    if images < len(digits):
        digits.keep_first_of_each_class(images)
    network = build_classifier("R8", "digits", objective.recipe.num_heads)
    return Trainer(objective.recipe, objective, network, torch.device("cpu"), digits, digits)
