"""One training run: flags, checkpoints, resume.

flags -> settings -> data -> classifier -> objective -> epochs -> checkpoint
"""

import argparse
import dataclasses
import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spacte import cli
from spacte.data.sources import open_split
from spacte.data.splits import BatchedSplit
from spacte.device import select_device
from spacte.distributed import init_distributed, is_main_process, main_process_first, on_main_process
from spacte.files import gone_on_failure
from spacte.model import build_classifier, checkpoint_file
from spacte.names import PLACE_SETTINGS, as_recorded_today, unused_settings
from spacte.precision import select_precision
from spacte.provenance import source_state
from spacte.train.objective import Objective
from spacte.train.pretrained import Teachers, inputs_sha256, take_trunk
from spacte.train.runlog import TrainingLog, TrainingPaths
from spacte.train.settings import Place, Recipe, add_place_flags, add_recipe_flags, available_workers
from spacte.train.trainer import Trainer, is_due
from spacte.utils import UserError


def main(objective_type: type[Objective], description: str, **defaults: Any) -> None:
    """The command line of a defence's train.py; `defaults` are those of its flags that differ from a Recipe's."""

    def command() -> None:
        recipe, place, own = parse(objective_type, description, **defaults)
        train(objective_type, recipe, place, own)

    cli.run(command)


def parse(
    objective_type: type[Objective], description: str, flags: list[str] | None = None, **defaults: Any
) -> tuple[Recipe, Place, dict]:
    """The settings that the flags (None: the command line's) name: recipe, place and the defence's own.

    Raises UserError if the defence's fields and flags do not belong together, or one has the name of another setting.
    """
    parser, own_defaults = cli.Parser(description), objective_type.own_defaults()
    add_recipe_flags(parser)
    _check_settings(objective_type, own_defaults, defaults)
    group = parser.add_argument_group("the base defence's own")
    try:
        objective_type.add_flags(group)
    except argparse.ArgumentError as error:
        raise UserError(f"{objective_type.__name__}.add_flags: {error.message}") from error
    for action in group._group_actions:
        if action.dest not in own_defaults:
            raise UserError(
                f"{objective_type.__name__} has no field '{action.dest}' for its flag {action.option_strings[0]}: is "
                "@dataclass missing?"
            )
    parser.set_defaults(**own_defaults | defaults)
    add_place_flags(parser)
    args = parser.parse_args(flags)
    own = {name: getattr(args, name) for name in own_defaults}
    return cli.settings_of(Recipe, args), cli.settings_of(Place, args), own


def _check_settings(objective_type: type[Objective], own: dict, defaults: dict) -> None:
    common = {*cli.defaults_of(Recipe), *cli.defaults_of(Place), "source"}  # what a log says of the code
    for name in own:
        if name in common:
            raise UserError(f"{objective_type.__name__}.{name}: every run has a setting of this name, take another")
    for name in defaults:
        if name not in common and name not in own:
            raise UserError(f"{objective_type.__name__}: no setting is called '{name}', whose default is given")


def train(objective_type: type[Objective], recipe: Recipe, place: Place, own: dict) -> None:
    """Train as the settings say, and leave checkpoints, a text log and TensorBoard files.

    `own` are the objective's own settings. Raises UserError before anything is written if a setting, file or folder
    is wrong, and RunError with the epoch, the step and every part where the loss is not finite.
    """
    init_distributed()
    device = select_device(place.device, recipe.compile)
    recipe = dataclasses.replace(recipe, precision=select_precision(recipe.precision, device))
    workers = available_workers() if place.workers is None else place.workers
    place = dataclasses.replace(place, workers=workers)
    train_split, test_split = _open_splits(recipe, place.data_dir, workers, device)
    objective = objective_type(recipe, train_split.spec.num_classes, **own)
    _warn_of_pace(recipe, objective.num_classes)
    run = on_main_process(lambda: _run_name(recipe, objective, place))
    paths = TrainingPaths.of(recipe, place, run)
    settings = dataclasses.asdict(recipe) | own
    resumed = on_main_process(lambda: _resume_point(paths, objective, settings, place.resume))

    torch.manual_seed(recipe.seed)
    classifier = build_classifier(recipe.arch, train_split.spec, recipe.num_heads)
    classifier.network.whole_gradient = recipe.whole_gradient
    done = resumed is not None and resumed["epoch"] == recipe.epochs  # then files that may be gone are not needed
    if recipe.frozen_trunk and not done:
        take_trunk(classifier, recipe.frozen_trunk, recipe, train_split.spec)
    if recipe.teachers and not done:
        objective.teachers = Teachers(recipe, train_split.spec, device)
    trainer = Trainer(recipe, objective, classifier, device, train_split, test_split, not place.no_cuda_graph)
    if resumed:
        trainer.restore(resumed)
    if trainer.epoch == recipe.epochs:
        if is_main_process():
            print(f"{paths.checkpoint(recipe.epochs)} is the last epoch: nothing is left to do")
        return
    inputs = on_main_process(lambda: inputs_sha256(objective.input_files()))
    with gone_on_failure(*paths.folders):  # made first: what a defence prepares may take hours
        on_main_process(paths.make_folders)
        trainer.prepare()
    text = resumed["log"] if resumed else ""
    log = TrainingLog(paths, recipe.epochs, trainer.epoch, text) if is_main_process() else None
    about = {"run": run, "defence": objective.name(), "args": settings | dataclasses.asdict(place)}
    about |= {"places": (*PLACE_SETTINGS, *objective.places)} | ({"inputs": inputs} if inputs else {})
    about |= (source := source_state(inspect.getfile(objective_type)))
    if resumed and is_main_process():
        _warn_of_other_code(resumed, source)
    for row in trainer.epochs(place.test_freq):
        if log:
            log.write(row)
        epoch = row["epoch"]
        if is_due(epoch, place.save_freq, recipe.epochs):
            state = trainer.state()  # every process has its part in it
            if log:
                checkpoint_file.save(paths.checkpoint(epoch), {**state, **about, "log": log.text})
    if log:
        print(f"checkpoint: {paths.checkpoint(recipe.epochs)}\nlog: {paths.log}\nTensorBoard: {paths.tensorboard}")


def _warn_of_pace(recipe: Recipe, num_classes: int) -> None:
    first = math.log(num_classes)
    if recipe.paced and recipe.pace_share is None and recipe.lbdlast > first and is_main_process():
        warnings.warn(
            f"--lbdlast {recipe.lbdlast} is above {first:.2f}, the loss of guessing among {num_classes} classes: "
            "lambda will rise to it, where the paper's falls",
            stacklevel=2,
        )


def _open_splits(
    recipe: Recipe, data_dir: str, workers: int, device: torch.device
) -> tuple[BatchedSplit, BatchedSplit]:
    """The training split, or its first images of each class, and the test split."""
    train_split = main_process_first(
        lambda: open_split(recipe.dataset, data_dir, train=True, device=device, workers=workers)
    )
    if recipe.train_images is not None:
        train_split.keep_first_of_each_class(recipe.train_images)
    spec = train_split.spec
    test_split = main_process_first(
        lambda: open_split(recipe.dataset, data_dir, train=False, device=device, workers=workers, spec=spec)
    )
    return train_split, test_split


def _run_name(recipe: Recipe, objective: Objective, place: Place) -> str:
    """The run's name; that of older versions where they have begun it."""
    ending = objective.run_suffix() + recipe.variant
    name, older = recipe.name + ending, recipe.older_name + ending
    begun = {run for run in (name, older) if TrainingPaths.of(recipe, place, run).epochs()}
    return older if begun == {older} else name


def _resume_point(paths: TrainingPaths, objective: Objective, settings: dict, resume: bool) -> dict | None:
    """The newest whole checkpoint of the run where --resume asks for one.

    Raises UserError if the run has checkpoints and --resume is not given, or was made with other settings or by
    another defence. A setting that an older checkpoint does not know had its default.
    """
    found = paths.epochs()
    if found and not resume:
        raise UserError(
            f"'{paths.checkpoints}' already holds epoch{found[0]}.pth: give --resume to resume there, or another "
            "--save_dir"
        )
    unreadable = []
    for epoch in found:
        try:
            contents = checkpoint_file.read(paths.checkpoint(epoch))
        except UserError as error:
            tqdm.write(f"passed over: {error}")
            unreadable.append(epoch)
            continue
        if not _is_whole(contents, epoch):
            raise UserError(f"'{paths.checkpoint(epoch)}' is not a checkpoint of train.py: it cannot be resumed")
        _check_same_run(contents, objective, settings, paths)
        return contents
    if unreadable:
        raise UserError(f"'{paths.checkpoints}' has no readable checkpoint: remove it to begin again")
    return None


def _is_whole(contents: dict, epoch: int) -> bool:
    """Whether these are the contents of this epoch's checkpoint, as a trainer restores them."""
    kinds = {"args": dict, "defence": str, "data": object, "rng": list, "log": str}
    kinds |= {"optimizer": dict, "scheduler": dict}
    if not all(isinstance(contents.get(name), kind) and name in contents for name, kind in kinds.items()):
        return False
    if "param_groups" not in contents["optimizer"]:
        return False
    return contents.get("epoch") == contents["scheduler"].get("last_epoch") == epoch


def _check_same_run(contents: dict, objective: Objective, settings: dict, paths: TrainingPaths) -> None:
    """UserError if the checkpoint's defence or one of its settings is another."""
    if contents["defence"] != objective.name():
        raise UserError(
            f"the run in '{paths.checkpoints}' was trained by {contents['defence']}, not by {objective.name()}"
        )
    known = cli.defaults_of(Recipe) | objective.own_defaults() | as_recorded_today(contents["args"])
    may_change = (*objective.recipe.inputs, *objective.inputs, *objective.places, *unused_settings(settings))
    for name, value in settings.items():
        if name not in may_change and known[name] != value:
            raise UserError(
                f"--{name} {value} contradicts the run in '{paths.checkpoints}', which has {name} {known[name]}"
            )
    _check_same_inputs(contents, objective, settings, paths)


def _warn_of_other_code(contents: dict, source: dict) -> None:
    """Warn where the checkpoint that is resumed was written by another version of the source."""
    before, now = contents.get("source_sha256"), source["source_sha256"]
    if isinstance(before, str) and before != now:
        said = f"source_sha256 {before[:8]} up to epoch {contents['epoch']}, {now[:8]} from here on"
        warnings.warn(
            f"the code has changed since this run was interrupted ({said}): is the loss the same?", stacklevel=2
        )


def _check_same_inputs(contents: dict, objective: Objective, settings: dict, paths: TrainingPaths) -> None:
    """UserError if the training took something from other files; those of a finished run may be gone."""
    files = [Path(path) for some in objective.input_files().values() for path in some]
    if contents["epoch"] == settings["epochs"] and not all(path.exists() for path in files):
        return
    began_with, here = contents.get("inputs", {}), inputs_sha256(objective.input_files())
    unknown = () if "places" in contents else objective.inputs  # to older versions
    for name in {**began_with, **here}:
        if name not in unknown and began_with.get(name) != here.get(name):
            there = contents["args"].get(name)
            raise UserError(
                f"--{name} {settings[name]}: the run in '{paths.checkpoints}' began with other networks, {there}"
            )
