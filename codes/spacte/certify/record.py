"""What a run's JSON says beside its configuration, and the size of passes, which a run keeps in all its parts."""

import dataclasses
import sys
from typing import Any

import torch

from spacte.certify.evaluation import Evaluation
from spacte.distributed import is_main_process, on_main_process
from spacte.logs.runfiles import RunFiles
from spacte.model import pass_size
from spacte.provenance import package_versions, source_state


def decide_pass_size(evaluation: Evaluation, files: RunFiles, requested: int | None, overwrite: bool) -> None:
    """Let passes on the CPU be as large as requested, or as the run's JSON or its other shards' say; else measure.

    The size may decide how logits round, and so a near tie: thus it is the same in all parts of a run, except that
    shards that begin at the same moment may measure different ones. Every process must call it.
    """
    network = evaluation.smooth.base_classifier

    def decided() -> int | None:
        """The main process decides for all."""
        if requested is not None:
            return requested
        earlier = files.earlier_about(overwrite)
        if earlier is not None and earlier.get("device") == "cpu":
            return earlier.get("images_per_pass")
        return pass_size.fastest_pass_size(network, evaluation.split[0][0])

    pass_size.set_pass_size(network, on_main_process(decided))


def note_pass_size(evaluation: Evaluation, files: RunFiles) -> None:
    """Note the size that passes have now: a GPU whose memory is short may have halved it since the run began."""
    if is_main_process():
        files.note("images_per_pass", _pass_size(evaluation))


def _pass_size(evaluation: Evaluation) -> int:
    return pass_size.pass_size(evaluation.smooth.base_classifier, evaluation.split[0][0])


def about(evaluation: Evaluation, *settings: Any) -> dict[str, Any]:
    """What a run's JSON records beside its configuration: what may change when it resumes.

    Some of it still matters to a log: the noise that a GPU draws depends on its model and on the batch size (see
    `Evaluation.generator`), and near ties depend on the images per pass.
    """
    device = evaluation.device
    return {
        "command": sys.argv,
        "flags": {name: value for one in settings for name, value in dataclasses.asdict(one).items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch_size": evaluation.batch_size,
        "images_per_pass": _pass_size(evaluation),
        "images": len(evaluation.split),
        "image_shape": list(evaluation.split.spec.shape),
        **source_state(),
        "packages": package_versions(),
        "training": evaluation.training,
    }
