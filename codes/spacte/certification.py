"""One certification run: images in order, votes, log.

checkpoint -> frozen classifier -> Smooth -> votes of each image -> log -> summary
"""

import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

from spacte import cli
from spacte.bounds import largest_radius
from spacte.certlog import read_log
from spacte.checkpoint import Loaded, load_classifier
from spacte.core_mhead import Smooth
from spacte.counts import Votes
from spacte.data import Split, open_split
from spacte.inference import freeze
from spacte.report import markdown, summary, table_radii
from spacte.runfiles import RunFiles
from spacte.utils import UserError, derived_seed, make_folder, package_versions, run_tail, select_device, sha256


def main(description: str) -> None:
    """The command line of certify_mhead.py."""
    cli.run(lambda: certify(_flags(description).parse_args()))


def _flags(description: str) -> cli.Parser:
    parser = cli.Parser(description)
    add = parser.add_argument
    add(
        "--model_path",
        required=True,
        help="checkpoint; what it knows (arch, dataset, num_heads, noise_sd) need not be given",
    )
    add("--arch")
    add("--dataset")
    add("--num_heads", type=cli.positive_int)
    add("--noise_sd", type=cli.positive_float, help="sigma, in units of [0, 1]")
    add("--data_dir", default="./data", help="where the data set's files are, or are downloaded to")
    add("--skip", type=cli.positive_int, default=1, help="every skip-th image: 0, skip, 2 skip, ...")
    add("--max", type=cli.positive_int, help="only images whose idx is below this")
    add("--N0", type=cli.positive_int, default=100, help="draws that select the class")
    add("--N", type=cli.positive_int, default=100_000, help="draws that bound its probability")
    add("--alpha", type=cli.open_probability, default=0.001, help="probability that a certificate is wrong")
    add("--batch_size", type=cli.positive_int, default=1000, help="noisy images a forward pass")
    add("--seed", type=cli.non_negative_int, default=0, help="image idx's noise is a function of (seed, idx)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network's arithmetic")
    add("--logs_dir", default="./logs")
    add("--overwrite", action="store_true", help="start the log anew instead of going on where it ends")
    return parser


def certify(args: Namespace) -> None:
    """Certify test images as the flags say; leaves the log, its counts, its configuration and its summary.

    A run that was interrupted goes on after its last image. Raises UserError before anything is written where a flag,
    file or folder is wrong.
    """
    device = select_device(args.device)
    loaded = load_classifier(Path(args.model_path), args.arch, args.dataset, args.num_heads, args.noise_sd)
    sigma = loaded.settings["noise_sd"]
    if sigma is None:
        raise UserError(f"checkpoint '{args.model_path}' does not say its noise_sd: give --noise_sd")
    limit = largest_radius(args.N, args.alpha, sigma)
    if limit is None:
        raise UserError(
            f"--N {args.N} at --alpha {args.alpha} can never certify: even {args.N} votes of {args.N} do not bound "
            "the probability above 1/2; take a larger N or alpha"
        )
    split = open_split(loaded.settings["dataset"], args.data_dir, False, device, spec=loaded.spec)
    files = _files(args, loaded)
    config = _config(args, loaded, split)
    make_folder(files.log.parent)
    done = files.start(config, {"command": sys.argv, "flags": vars(args), "device": _name(device)}, args.overwrite)

    smooth = Smooth(freeze(loaded.classifier, device, args.precision), split.spec.num_classes, sigma)
    last = done[-1].idx if done else -1
    todo = [idx for idx in range(0, min(len(split), args.max or len(split)), args.skip) if idx > last]
    acr = RunningACR(config)
    for votes in done:
        acr.add(votes)
    with tqdm(total=len(done) + len(todo), initial=len(done), unit="image", disable=None, dynamic_ncols=True) as bar:
        for idx in todo:
            votes = count_image(smooth, split, idx, args)
            files.append(votes, config)
            acr.add(votes)
            bar.set_postfix(ACR=f"{acr.mean():.3f}")
            bar.update()
            if bar.disable and acr.due():
                print(f"{acr.images}/{bar.total} images  ACR {acr.mean():.3f}", flush=True)
    table = summary({files.log.stem: read_log(files.log)}, table_radii(limit))
    files.summary.write_text(markdown(table) + "\n")
    print(f"{markdown(table)}\nlog: {files.log}")


def count_image(smooth: Smooth, split: Split, idx: int, args: Namespace) -> Votes:
    """The selection and estimation votes of image idx; its noise is a function of (seed, idx) alone."""
    started = time.monotonic()
    image, label = split[idx]
    generator = torch.Generator(image.device).manual_seed(derived_seed(args.seed, idx))
    selection = smooth.count_votes(image, args.N0, args.batch_size, generator)
    estimation = smooth.count_votes(image, args.N, args.batch_size, generator)
    return Votes(idx, label, time.monotonic() - started, selection, estimation)


class RunningACR:
    """The ACR so far, and when a run without a terminal should say so."""

    def __init__(self, config: dict):
        self.config, self.images, self.sum, self.said = config, 0, 0.0, time.monotonic()

    def add(self, votes: Votes) -> None:
        """Count one more image."""
        predict, radius = votes.certificate(self.config["alpha"], self.config["noise_sd"])
        self.images += 1
        self.sum += radius * (predict == votes.label)

    def mean(self) -> float:
        """The ACR of the images so far."""
        return self.sum / self.images

    def due(self, seconds: float = 30) -> bool:
        """Whether `seconds` have passed since this was last true."""
        now = time.monotonic()
        if now - self.said < seconds:
            return False
        self.said = now
        return True


def _files(args: Namespace, loaded: Loaded) -> RunFiles:
    settings = loaded.settings
    tail = run_tail(settings["dataset"], settings["arch"], settings["noise_sd"])
    folder = Path(args.logs_dir) / tail / "certify-mhead"
    return RunFiles.of_log(folder / f"{loaded.run}-certify-skip-{args.skip}.log")


def _config(args: Namespace, loaded: Loaded, split: Split) -> dict:
    """What a log's rows must have in common."""
    return {
        **loaded.settings,
        "checkpoint_sha256": sha256(Path(args.model_path)),
        "data_sha256": split.fingerprint(),
        **{name: getattr(args, name) for name in ("N0", "N", "alpha", "seed", "precision", "skip")},
        "versions": package_versions(),
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
