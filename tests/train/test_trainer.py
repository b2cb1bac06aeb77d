"""What the trainer does with a recipe: which images a step gets, which numbers it draws, what it looks at."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from spacte.data.spec import DataSpec
from spacte.data.splits import InMemory
from spacte.model.classifier import Classifier
from spacte.train import trainer as trainer_module
from spacte.train.accuracy import warn_of_lost_classes
from spacte.train.objective import Objective
from spacte.train.settings import Recipe
from spacte.train.trainer import Trainer

CPU = torch.device("cpu")

SPEC = DataSpec("marked", (1, 8, 8), 2, (0.5,), (0.5,))


def marked_images(n):
    """n images whose first pixel tells their number and whose second their label, 255 for 1."""
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    labels = torch.arange(n) % 2
    images[:, 0, 0, 1] = labels * 255
    return InMemory(SPEC, images, labels)


class ReadsTheLabel(nn.Module):
    """Two heads that read the label off the image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        score = (images[:, 0, 0, 1] - 0.5) * self.scale
        return torch.stack([-score, score], 1).expand(2, -1, -1)


class Spy(Objective):
    """Notes which images each step gets."""

    def __init__(self, recipe, num_classes):
        super().__init__(recipe, num_classes)
        self.seen = []

    def __call__(self, classifier, images, labels, epoch):
        self.seen.append((images[:, 0, 0, 0] * 255).round().int().tolist())
        loss = classifier(images).square().mean()
        return loss, {"ce": loss}


def trainer_on(images, **flags):
    recipe = Recipe(
        epochs=1, batch_size=8, num_noise_vec=2, noise_sd=0.1, lr_step_size=2, wd=3e-4, seed=0, lbdlast=1.0, num_heads=2
    )  # fmt: skip
    recipe = dataclasses.replace(recipe, **flags)
    split, classifier = marked_images(images), Classifier(nn.Identity(), ReadsTheLabel())
    return Trainer(recipe, Spy(recipe, 2), classifier, CPU, split, split)


def test_a_step_gets_a_mini_batch_and_an_epoch_every_image():
    trainer = trainer_on(21, batch_size=8, num_noise_vec=2)
    list(trainer.epochs())
    steps = trainer.objective.seen
    assert [len(step) for step in steps] == [4, 4, 4, 4, 3, 2]
    seen = [number for step in steps for number in step]
    assert sorted(seen) == list(range(21)) != seen


def test_each_epoch_of_each_seed_has_its_own_order_and_draws():
    orders, draws = [], []
    for seed in (0, 1):
        trainer = trainer_on(21, seed=seed, epochs=2)
        draws.append(float(torch.rand(())))
        list(trainer.epochs())
        orders += [str(trainer.objective.seen[:6]), str(trainer.objective.seen[6:])]
    assert len(set(orders)) == 4 and len(set(draws)) == 2


def test_what_a_hook_draws_before_an_epoch_moves_no_draw_of_the_training(monkeypatch):
    after = []
    for drawn in (0, 5):
        monkeypatch.setattr(Spy, "sampling_weights", lambda *given, drawn=drawn: torch.rand(drawn).sum() < 0 or None)
        list(trainer_on(16, epochs=2).epochs())
        after.append(float(torch.rand(())))
    assert after[0] == after[1]


def test_each_epochs_accuracy_is_under_noise_of_its_own(monkeypatch):
    seen, count = [], trainer_module.count_right
    monkeypatch.setattr(
        trainer_module, "count_right", lambda *args: (seen.append(float(torch.rand(()))), count(*args))[1]
    )
    for _ in range(2):
        list(trainer_on(16, epochs=2).epochs())
    assert seen[:2] == seen[2:] and seen[0] != seen[1]


def test_a_run_that_other_processes_resume_draws_anew_in_each_epoch():
    draws = []
    for epoch in (1, 2):
        trainer = trainer_on(16, epochs=3)
        trainer.restore(trainer.state() | {"rng": [], "epoch": epoch})
        draws.append(float(torch.rand(())))
    assert draws[0] != draws[1]


def test_the_draws_of_other_processes_are_not_gone_on_with():
    trainer = trainer_on(16, epochs=3)
    state, following = trainer.state(), float(torch.rand(()))
    trainer.restore(state)
    assert float(torch.rand(())) == following
    trainer.restore(state | {"rng": state["rng"] * 2})
    assert float(torch.rand(())) != following


def test_the_learning_rate_drops_and_weights_decay():
    trainer = trainer_on(16, epochs=5, lr_init=0.2, lr_step_size=2, gamma=0.5)
    assert [row["lr"] for row in trainer.epochs()] == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05])
    (group,) = trainer.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (3e-4, 0.9, False)


def test_the_noisy_accuracy_is_one_under_noise():
    """A classifier that reads one pixel: certain under small noise, no better than chance (6 SE) under large."""
    assert trainer_on(200, noise_sd=0.01).noisy_accuracy() == {"acc": 1, "acc0": 1, "acc1": 1}
    drowned = trainer_on(200, noise_sd=100).noisy_accuracy()
    assert abs(drowned["acc"] - 0.5) < 6 * 0.5 / 200**0.5 and drowned["acc"] == drowned["acc0"]


@pytest.mark.parametrize(("epochs", "says"), [(1, True), (2, False)])
def test_a_class_that_training_has_given_up_is_named_after_the_last_epoch(epochs, says):
    """Here the classifier answers 0 everywhere."""
    trainer = trainer_on(200, noise_sd=0.01, epochs=epochs)
    trainer.epoch = 1
    for parameter in trainer.classifier.parameters():
        parameter.data.zero_()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.noisy_accuracy()
    texts = [str(one.message) for one in said if "given up" in str(one.message)]
    assert len(texts) == says and all(text.startswith("no noisy test image is right of class 1") for text in texts)


def test_a_class_is_lost_if_the_ensemble_gets_none_of_its_images_right():
    """Not where there is no image, nor where a head alone gets none."""
    spec = DataSpec("three", (1, 8, 8), 3, (0.5,), (0.5,))
    right, images = torch.tensor([[5.0, 0, 0], [5, 3, 0]]), torch.tensor([9.0, 9, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost_classes(right, images, spec)
    with pytest.warns(UserWarning, match="of class 1"):
        warn_of_lost_classes(right.flip(0), images, spec)
