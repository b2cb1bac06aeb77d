"""Which runs may stand side by side: the same images, certified alike."""

import itertools
import json
import warnings

import numpy as np

from spacte.logs.certlog import first_line
from spacte.logs.config import RunConfig
from spacte.names import PLACE_SETTINGS, unused_settings
from spacte.report.labels import experiment_label
from spacte.report.run import Run
from spacte.utils import UserError, listed

INPUTS = {"teachers": "teachers", "frozen_trunk": "trunk", "pretrained_model": "pretrained network"}  # of a training
_MOST_GROUPS = 6  # about which a table says something
# settings in which two seeds of one experiment may differ: the seed, where files go, the paths of inputs. A training
# also records its defence's own such settings, under `inputs` and `places`; older ones did not
_MAY_DIFFER_BETWEEN_SEEDS = ("seed", *PLACE_SETTINGS, "places", "inputs", *INPUTS, "votes_dir", "source")


def check_same_images(runs: list[Run]) -> None:
    """UserError that names file and line if the runs are about two data sets, or an image has two labels."""
    first: dict[int, tuple[int, Run]] = {}
    known = [run for run in runs if run.dataset]
    for run in runs:
        if known and run.dataset and run.dataset != known[0].dataset:
            there = f"'{known[0].path}', line 1: about {known[0].dataset}"
            raise UserError(f"two data sets in one report: '{run.path}', line 1: about {run.dataset}; {there}")
        earlier = run.log["idx"].map(lambda idx: first[idx][0] if idx in first else np.nan)
        other = earlier.notna() & (earlier != run.log["label"])
        if other.any():
            row = run.log[other].iloc[0]
            label, other_run = first[row["idx"]]
            raise UserError(
                f"two data sets in one report: '{run.path}', line {first_line(other)}: idx {row['idx']} has label "
                f"{row['label']}, but {label} in '{other_run.path}'"
            )
        for idx, label in zip(run.log["idx"], run.log["label"], strict=True):
            first.setdefault(idx, (label, run))


def warn_of_other_images(runs: list[Run]) -> None:
    """A warning if the images that runs were made from have two hashes: their rows are then not ranked together."""
    hashed = {_data_sha256(run): run for run in reversed(runs) if _data_sha256(run)}
    if len(hashed) > 1:
        one, other, *_ = reversed(hashed.values())
        text = f"'{one.path}' and '{other.path}': two data_sha256, so perhaps not the same images; they are not ranked"
        warnings.warn(f"{text} together", stacklevel=2)


def check_pair(a: Run, b: Run) -> None:
    """UserError if runs cannot be compared image by image, because their images have two hashes."""
    if _of_other_images(a, b):
        raise UserError(
            f"'{a.path}' and '{b.path}' cannot be compared image by image: two data_sha256, so perhaps not the same "
            "images; certify both on the same files"
        )


def _data_sha256(run: Run) -> str:
    """The hash of the images that the run was made from; "" where it is not known."""
    return run.config.data_sha256 if run.config else ""


def _of_other_images(a: Run, b: Run) -> bool:
    """Whether two runs were made from images of two hashes: their images of one number need not be the same."""
    return len({_data_sha256(a), _data_sha256(b)} - {""}) > 1


def certification_differences(a: Run, b: Run) -> str:
    """How two certifications differ, as far as both configurations tell: the fields, with both values."""
    if a.config is None or b.config is None:
        return ""
    one, other = a.config.certification(), b.config.certification()
    differing = [name for name in one if name in other and one[name] != other[name]]
    unset = {"sequential": "no", "top_k": 1}

    def text(config: RunConfig, name: str) -> str:
        value = getattr(config, name)
        return str(unset.get(name) if value is None else value)

    return ", ".join(f"{name} {text(a.config, name)} and {text(b.config, name)}" for name in differing)


def experiments(runs: list[Run]) -> list[str]:
    """The name of each run's experiment, which its seeds share.

    It is the run's name. If runs of the same name and description were trained with different recipes, as far as their
    configurations tell, it is followed by the settings that differ: h-1-m-2, lr_init 0.3. What trainings took from
    other files (teachers, say) is another recipe, unless the user has put them as seeds into one folder.
    """
    recipes, names = _recipes_of_folders(runs), []
    for run, recipe in zip(runs, recipes, strict=True):
        others = [other for like, other in zip(runs, recipes, strict=True) if like.experiment_key == run.experiment_key]
        particular = [name for name in recipe if any(other and _differ(recipe, other, name) for other in others)]
        names.append(", ".join([run.name, *(f"{name} {recipe[name]}" for name in particular)]))
    return names


def _recipes_of_folders(runs: list[Run]) -> list[dict[str, str]]:
    """The runs' recipes with their inputs, which those of all runs of a label are: aaaaaaaa or bbbbbbbb."""
    keys = [(*run.experiment_key, experiment_label([run]) or number) for number, run in enumerate(runs)]
    together: dict[tuple, dict[str, None]] = {}
    for key, run in zip(keys, runs, strict=True):
        together.setdefault(key, {}).update(dict.fromkeys(_inputs(run)))
    return [
        _recipe(run) | ({"inputs": " or ".join(together[key])} if _inputs(run) else {})
        for key, run in zip(keys, runs, strict=True)
    ]


def rows_of(runs: list[Run], over_seeds: bool) -> list[tuple[str, list[Run]]]:
    """The rows of a table with their names: each run, or with `over_seeds` the runs of each experiment.

    Ensembles that share a network are not independent seeds: those that the user calls differently have rows of their
    own. Raises UserError if the runs of an experiment differ by more than their seed, see `check_seeds`.
    """
    if not over_seeds:
        return [(run.title, [run]) for run in runs]
    alike: dict[tuple, list[Run]] = {}
    for run, name in zip(runs, experiments(runs), strict=True):
        alike.setdefault((name, *run.experiment_key), []).append(run)
    found = [(name, some) for (name, *_), group in alike.items() for some in _by_label(group)]
    for _, some in found:
        check_seeds(some)
    user_labels = [(experiment_label(some), tuple(some[0].facts.values())) for _, some in found]
    rows = []
    for (name, some), user in zip(found, user_labels, strict=True):
        label, _ = user
        if not label or user_labels.count(user) > 1:
            label = ", ".join(filter(None, (label, name)))
        rows.append((f"{label}, {len(some)} run{'s' * (len(some) > 1)}", some))
    return rows


def _by_label(runs: list[Run]) -> list[list[Run]]:
    """Like runs as one experiment; where two share a network, as one for each label."""
    share = any(checkpoints_of(a) & checkpoints_of(b) for a, b in itertools.combinations(runs, 2))
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(experiment_label([run]) if share else "", []).append(run)
    return list(found.values())


def _recipe(run: Run) -> dict[str, str]:
    """The settings that the classifier was trained with, except seed, places and unused ones; of an ensemble each
    setting's different values, as 0.1+0.3.
    """
    trained = []
    for one in run.training:
        places = one.get("places")
        own = places if isinstance(places, list | tuple) else ()
        left_out = (*_MAY_DIFFER_BETWEEN_SEEDS, *own, *inputs_of(one), *unused_settings(one))
        trained.append({name: value for name, value in one.items() if name not in left_out})
    names = {name: None for one in trained for name in one}
    return {name: "+".join(dict.fromkeys(_short(one.get(name)) for one in trained)) for name in names}


def _inputs(run: Run) -> list[str]:
    """What the run's trainings took from files, as one text; none where they have recorded nothing."""
    texts = dict.fromkeys(_short(one.get("inputs")) for one in run.training)
    return ["+".join(texts)] if any("inputs" in one for one in run.training) else []


def inputs_of(training: dict) -> dict:
    """The hashes of what a training took from files, by the setting that names them."""
    inputs = training.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _short(value: object) -> str:
    """A setting as text; of the hashes of what a training took from files, the first digits."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {'+'.join(one[:8] for one in hashes)}" for name, hashes in value.items())
    return str(value)


def _differ(one: dict[str, str], other: dict[str, str], name: str) -> bool:
    """Whether two recipes differ in a setting. Older runs have not recorded the hashes of their `inputs`."""
    unknown = name == "inputs" and not (name in one and name in other)
    return not unknown and one.get(name) != other.get(name)


def _recipe_differences(a: Run, b: Run) -> str:
    """How the classifiers' recipes differ, as far as both configurations tell them: the settings, with both values."""
    one, other = _recipe(a), _recipe(b)
    names = [name for name in one | other if one.get(name) != other.get(name)] if one and other else []
    return ", ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in names)


def comparable_groups(runs: list[Run]) -> list[int]:
    """The number, from 1, of each run's group: runs of one group certify the same images in the same way.

    The images are the same if their numbers are and their data_sha256; the way is `RunConfig.certification`. Runs whose
    configurations lack one of its fields, or that have none, share a group only with runs that lack the same. This
    alone decides which rows of a table are ranked against each other.
    """
    keys = [
        (frozenset(run.log["idx"]), _data_sha256(run), json.dumps(run.config.certification()) if run.config else "")
        for run in runs
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys), start=1)}
    return [numbers[key] for key in keys]


def group_remarks(runs: list[Run]) -> list[str]:
    """How each group of `comparable_groups` differs from the first, a line for each of the first few."""
    first: dict[int, Run] = {}
    for run, group in zip(runs, comparable_groups(runs), strict=True):
        first.setdefault(group, run)
    lines = []
    for group, run in first.items():
        differences = [certification_differences(first[1], run)]
        images = [set(one.log["idx"]) for one in (first[1], run)]
        if images[0] != images[1]:
            differences.append(f"{len(images[0])} and {len(images[1])} images, {len(images[0] & images[1])} shared")
        if _of_other_images(first[1], run):
            differences.append("two data_sha256")
        if bool(_data_sha256(first[1])) != bool(_data_sha256(run)):
            differences.append("data_sha256 known of one alone")
        found = ", ".join(filter(None, differences)) or "one of them does not say how it was certified"
        lines.append(f"Group {group} is not ranked with group 1: {found}.")
    more = len(lines) - 1 - _MOST_GROUPS
    return lines[1 : _MOST_GROUPS + 1] + [f"There are {more} more groups."] * (more > 0)


def check_seeds(runs: list[Run]) -> None:
    """UserError that names two of the runs if they are not two seeds of one experiment.

    Seeds of one experiment certify the same images with the same settings and were trained with the same recipe, but
    differ in checkpoint and seed. Of a log without a configuration only the images are compared, since the rest is not
    known. A warning says where different code trained them, or they took something (teachers, say) from other files:
    seeds of a whole method have teachers of their own.
    """
    for a, b in itertools.combinations(runs, 2):
        differences = [_recipe_differences(a, b), certification_differences(a, b)]
        images = [set(run.log["idx"]) for run in (a, b)]
        if images[0] != images[1]:
            shared = len(images[0] & images[1])
            differences.append(f"{len(images[0])} and {len(images[1])} images, {shared} of them the same")
        if _of_other_images(a, b):
            differences.append("two data_sha256 of the images")
        twice = checkpoints_of(a) & checkpoints_of(b)
        if twice:
            differences.append(f"one checkpoint_sha256, {min(twice)}")
        seeds = _seeds(a) & _seeds(b)
        if seeds and not twice:
            differences.append(f"one seed of the training, {min(seeds)}")
        found = ", ".join(filter(None, differences))
        if found:
            two = f"'{a.path}' and '{b.path}'"
            raise UserError(f"{two} are not two seeds of one experiment: {found}; leave one of them out")
    known = [sources for run in runs if (sources := _sources(run))]
    name = experiment_label(runs) or runs[0].name
    if len({tuple(sources) for sources in known}) > 1:
        every = dict.fromkeys(itertools.chain(*known))
        text = f"the runs of '{name}' were trained by different code"
        warnings.warn(f"{text} (source_sha256 {listed(one[:8] for one in every)}): the same method?", stacklevel=2)
    taken = dict.fromkeys(itertools.chain(*map(_inputs, runs)))
    if len(taken) > 1:
        text = f"the runs of '{name}' did not all learn from the same files ({'; '.join(taken)})"
        warnings.warn(f"{text}: what others would change is then in their spread", stacklevel=2)


def _sources(run: Run) -> list[str]:
    """The hashes of the code that trained the run's networks, as far as they are known."""
    sources = [one.get("source") for one in run.training]
    return [str(one["source_sha256"]) for one in sources if isinstance(one, dict) and "source_sha256" in one]


def _seeds(run: Run) -> set[str]:
    return {str(one["seed"]) for one in run.training if "seed" in one}


def checkpoints_of(run: Run) -> set[str]:
    """The hashes of what a run's classifier was loaded from; none where nothing tells."""
    if run.config is None:
        return set()
    parameters = run.config.parameters_sha256
    return {*run.config.checkpoint_sha256, *([parameters] if parameters else ())}
