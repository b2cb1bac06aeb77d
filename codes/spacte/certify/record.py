"""What a run's JSON says beside its configuration, and the size of passes, which a run keeps in all its parts."""

import dataclasses
import sys
from typing import Any

import torch

from spacte.certify.evaluation import Evaluation
from spacte.distributed import on_main_process
from spacte.logs.runfiles import RunFiles
from spacte.model import pass_size
from spacte.provenance import package_versions, source_state


def decide_pass_size(evaluation: Evaluation, files: RunFiles, requested: int | None, overwrite: bool) -> None:
    """Let passes on the CPU be as large as requested, or as the run's JSON or its other shards' say; else measure.

    So the counts of a run, whose last digit they may decide, are the same in all its parts, except that shards which
    begin in the same moment may measure differently. Every process must call it.
    """
    network = evaluation.smooth.base_classifier

    def decided() -> int | None:
        """The main process decides for all."""
        if requested is not None:
            return requested
        earlier = files.noted(overwrite)
        if earlier is not None and earlier.get("device") == "cpu":
            return earlier.get("images_per_pass")
        return pass_size.fastest_pass_size(network, evaluation.split[0][0])

    pass_size.set_pass_size(network, on_main_process(decided))


def about(evaluation: Evaluation, *settings: Any) -> dict[str, Any]:
    """What a run's JSON records beside its configuration: what may change when it resumes.

    Of these a log depends on the device: only the same model of card draws the same noise as a GPU did.
    """
    device = evaluation.device
    return {
        "command": sys.argv,
        "flags": {name: value for one in settings for name, value in dataclasses.asdict(one).items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch_size": evaluation.batch_size,
        "images_per_pass": pass_size.pass_size(evaluation.smooth.base_classifier, evaluation.split[0][0]),
        "images": len(evaluation.split),
        "image_shape": list(evaluation.split.spec.shape),
        **source_state(),
        "packages": package_versions(),
        "training": evaluation.training,
    }
