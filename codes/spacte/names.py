"""What runs are called, and what the settings of a training run were called before."""

import hashlib
import re
from pathlib import Path

_LONGEST_NAME = 150  # bytes; what is appended, -certify-skip-20-...-counts.jsonl say, has the other hundred


def printable_name(text: str) -> str:
    """The text as a part of a file's name: letters, digits, '.', '_', '+' and '-' stay, the rest becomes '_'.

    The end of one that is too long for a file's name becomes its hash.
    """
    name = re.sub(r"[^\w.+-]", "_", text).lstrip(".") or "_"
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name.encode()[: _LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"


def run_tail(dataset: str, arch: str, noise_sd: float) -> Path:
    """The part that all of a run's folders share: <dataset>/<arch>/noise-<sd>, sd with at least two decimals."""
    two_decimals = f"{noise_sd:.2f}"
    return Path(dataset, arch, f"noise-{two_decimals if float(two_decimals) == noise_sd else noise_sd}")


# the fields of a training run's Place: nothing that it computes depends on them
PLACE_SETTINGS = (
    "data_dir", "save_dir", "logs_dir", "runs_dir", "save_freq", "test_freq", "device", "workers", "no_cuda_graph",
    "resume",
)  # fmt: skip

CERTIFICATIONS = "certify-mhead"  # the folder of certification logs

_LATER_SETTINGS = {  # those that older training runs did not record, with the values that these runs had
    "paced_by": "neighbour",
    "pace_share": None,
    "whole_gradient": False,
    "teachers": (),
    "frozen_trunk": None,
}


def as_recorded_today(training: dict) -> dict:
    """The settings of a training run, as any version recorded them, by today's names."""
    training = dict(training)
    if training.pop("no_teaching", False):
        training["paced_by"] = "none"
    return _LATER_SETTINGS | training if training else training


def unused_settings(training: dict) -> tuple[str, ...]:
    """Those of a training run's settings on which nothing in it depends.

    One head shares its weight with no other (eps), and has no lambda (lbdlast) unless it paces itself.
    """
    if training.get("num_heads") != 1:
        return ()
    return ("eps",) if training.get("paced_by") == "self" else ("eps", "lbdlast")


_NUMBER = r"\d[\d.]*(?:e[-+]?\d+)?"
_OLDER_NAME = re.compile(rf"(?<![^+])h-1-eps-{_NUMBER}(-m-\d+)(-lbdlast-{_NUMBER})([^+]*)")


def run_name_of_today(run: str) -> str:
    """The name of a training run, or of an ensemble's (a+b), as any version gave it, without `unused_settings`."""
    return _OLDER_NAME.sub(lambda part: f"h-1{part[1]}{part[2] * ('-paced-by-self' in part[3])}{part[3]}", run)
