"""Checkpoints made smaller: what certification needs, and files in parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from spacte import cli
from spacte.data.sources import open_split
from spacte.files import check_ending, make_folder, sha256
from spacte.model import checkpoint, checkpoint_file
from spacte.model.scales import SCALE_IMAGES, Scales
from spacte.names import PLACE_SETTINGS
from spacte.provenance import SOURCE_FIELDS
from spacte.utils import UserError

_KEPT = ("state_dict", "data", "data_sha256", "run", "defence", "epoch", "source_sha256", "commit", "versions")


def main(description: str) -> None:
    """The command line of release.py: writes the smaller file; prints its size and SHA-256."""
    cli.run(lambda: _command(description))


def _command(description: str) -> None:
    parser = cli.Parser(description)
    parser.add_argument("checkpoint", type=Path, help="an epoch<k>.pth of train.py")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.pth", help="the file to write")
    parser.add_argument("--half", action="store_true", help="weights as float16")
    scales = "also the scales of certification with --precision int8, measured on the training images there"
    parser.add_argument("--int8", metavar="DATA_DIR", help=scales)
    args = parser.parse_args()
    release(args.checkpoint, args.output, args.half, args.int8)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, SHA-256 {sha256(args.output)}")


def release(path: Path, output: Path, half: bool = False, int8: str | None = None) -> None:
    """Write to `output` what certification needs of the checkpoint at `path`; UserError if that cannot be done.

    `int8` is the folder of the training images: the file then also holds the scales measured on them. They can be
    added to a file that has been released already.
    """
    check_ending(output, (".pth",))
    contents = checkpoint_file.read(path)
    if output.exists():
        raise UserError(f"'{output}' exists: choose another --output")
    if not contents.keys() >= set(_KEPT):
        raise UserError(f"'{path}' is not a checkpoint of train.py")
    if "optimizer" not in contents and (half or int8 is None or "int8" in contents):
        what = "; --int8 alone would add its scales" if "int8" not in contents else ", with scales of int8"
        raise UserError(f"'{path}' holds no optimiser: it has been released already{what}")
    released = {name: contents[name] for name in (*_KEPT, *SOURCE_FIELDS) if name in contents}
    places = contents.get("places", PLACE_SETTINGS)  # of older versions without the defence's own
    released["args"] = {name: value for name, value in contents["args"].items() if name not in places}
    if "inputs" in contents:  # their hashes stay, the folders in which they lay do not
        released["inputs"] = contents["inputs"]
        released["args"] |= {name: _names(contents["args"][name]) for name in contents["inputs"]}
    if half:
        released["state_dict"] = {name: _half(name, value) for name, value in contents["state_dict"].items()}
    if int8 is not None:
        released["int8"] = _scales(contents | released, path, int8).to_file()
    make_folder(output.absolute().parent)
    checkpoint_file.save(output, released)


def _names(paths: str | Path | Sequence[str | Path]) -> str | tuple[str, ...]:
    return Path(paths).name if isinstance(paths, str | Path) else tuple(Path(path).name for path in paths)


def _scales(released: dict, path: Path, data_dir: str) -> Scales:
    """Of int8, for the weights that are released. UserError if the folder does not hold the training images."""
    loaded = checkpoint.classifier_from_contents(released, path)
    split = open_split(loaded.dataset, data_dir, train=True, spec=loaded.spec)
    images, _ = split.evenly_spaced(SCALE_IMAGES)
    if released["args"].get("train_images") is not None:
        split.keep_first_of_each_class(released["args"]["train_images"])
    if split.fingerprint() != released["data_sha256"]:
        raise UserError(f"--int8 '{data_dir}': '{path}' was trained on other images than are there")
    return cast(Scales, loaded.with_scales(images).scales)


def _half(name: str, value: torch.Tensor) -> torch.Tensor:
    """UserError if float16 cannot hold a value."""
    half = value.half() if value.is_floating_point() else value
    if not half.isfinite().all():
        raise UserError(f"--half: '{name}' holds values that float16 cannot: leave --half out")
    return half
