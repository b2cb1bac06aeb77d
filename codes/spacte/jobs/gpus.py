"""The GPUs that a queue assigns to its jobs, by the names that CUDA_VISIBLE_DEVICES has for them, without torch."""

import itertools
import os
import re
import subprocess
from collections.abc import Sequence

from spacte.jobs.job import Job, flag_values


def visible_gpus() -> list[str]:
    """Those that this process would see: the ones in CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists.

    A GPU that is divided (MIG) counts as its parts. Empty where there are none, or where this is not known.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:  # CUDA reads it up to the first part that names nothing, such as -1
        names = (part.strip() for part in listed.split(","))
        return list(itertools.takewhile(lambda name: re.fullmatch(r"\d+|(GPU|MIG)-.+", name), names))
    try:
        command = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    # UUIDs, because CUDA need not number GPUs as nvidia-smi does; the parts of a GPU come after it
    found = re.findall(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", command.stdout)
    divided = {one for one, after in itertools.pairwise(found) if one.startswith("GPU") and after.startswith("MIG")}
    return [name for name in found if name not in divided]


def gpu_of(job: Job, slot: int, gpus: Sequence[str]) -> str | None:
    """The slot's GPU, from the first one again after the last; None where all jobs see what the queue sees.

    So it is with one GPU or none, and for a job whose flags number a GPU themselves (--device cuda:<index>).
    """
    devices = [value for flags in (job.train, job.certify) for value in flag_values(flags or ()).get("--device", [])]
    if len(gpus) < 2 or any(device.startswith("cuda:") for device in devices):
        return None
    return gpus[slot % len(gpus)]
