"""The soft votes of a pretrained smoothed classifier on the training images, counted once and kept in files."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from spacte.certify.evaluation import Evaluation
from spacte.certify.loading import load
from spacte.certify.record import about, decide_pass_size
from spacte.certify.settings import ClassifierSettings
from spacte.certify.writer import writing
from spacte.data.splits import Split
from spacte.distributed import get_world_size, is_main_process, on_main_process
from spacte.logs.config import RunConfig
from spacte.logs.counts import read_counts, read_text
from spacte.logs.plans import PredictPlan
from spacte.logs.runfiles import RunFiles, folder_of
from spacte.model.passes import fixed_pass_modules
from spacte.train.settings import Recipe
from spacte.utils import TakenError, UserError

_ALPHA = 0.001  # of the predictions in the log beside the votes
_SECONDS_BETWEEN_TRIES = 10  # while another run counts


def soft_votes(pretrained: str, draws: int, folder: str, split: Split, recipe: Recipe) -> Tensor:
    """A pretrained smoothed classifier's share of votes for each class on each image of the split, [n, K].

    A prediction run (spacte.certify.predict) over the images, not augmented, with the noise that the network was
    trained with. It leaves `<folder>/<dataset>/<arch>/noise-<sd>/votes/<run>-votes-<draws>*`: an interrupted count
    resumes after its last image, and what is counted is read. The votes do not depend on the training run's seed, so
    that other runs share them.

    Raises UserError if the checkpoint is of other data or classes, or the files are of another network, split or
    number of draws; then nothing is written. Where another run is counting them, it waits for that one.
    """
    device = split.device.type if get_world_size() > 1 else str(split.device)
    settings = ClassifierSettings((pretrained,), dataset=recipe.dataset, device=device, precision=recipe.precision)
    evaluation = load(settings, draws, split)
    plan = PredictPlan(replace(evaluation.config, kind="votes", N=draws, alpha=_ALPHA))
    files = RunFiles(folder_of(plan.config, folder, "votes") / f"{evaluation.run_name}-votes-{draws}.log")
    waits = False
    while not on_main_process(lambda: _is_complete(files, plan.config, len(split))):
        try:
            _count(evaluation, plan, files, settings)
        except TakenError as error:
            if is_main_process() and not waits:
                print(f"waiting for the pretrained network's votes: {error}", flush=True)
            waits = True
            time.sleep(_SECONDS_BETWEEN_TRIES)
    for network in fixed_pass_modules(evaluation.smooth.base_classifier):
        network.forget_functions()  # a GPU's graphs have memory of their own
    counted = on_main_process(lambda: read_counts(files.counts))  # in the order of the images
    votes = torch.stack([torch.from_numpy(counts.estimation[-1]) for counts in counted])
    return votes.float() / draws


def _count(evaluation: Evaluation, plan: PredictPlan, files: RunFiles, settings: ClassifierSettings) -> None:
    if is_main_process():
        print(f"counting the pretrained network's votes: {files.counts}")
    decide_pass_size(evaluation, files, settings.images_per_pass, overwrite=False)
    with writing(files, plan, about(evaluation, settings), list(range(len(evaluation.split)))) as writer:
        for counts in evaluation.count_votes("votes", writer.missing, plan.draws):
            writer.write(counts)


def _is_complete(files: RunFiles, config: RunConfig, images: int) -> bool:
    """Whether all images are counted. UserError if some were counted with another configuration."""
    if not files.json.exists():
        return False
    differences = files.read_json().config.differences(config)
    if differences:
        raise UserError(f"the votes '{files.counts}' are others: {differences}; give another --votes_dir")
    return read_text(files.counts).count("\n") == images
