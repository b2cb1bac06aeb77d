"""All speeds of a GPU in one process, what matters most first, within a given time.

    python codes/bench/bench_speeds.py --seconds 100 --device cuda --json speeds.json
    python codes/bench/bench_speeds.py --tiny --device cpu --json speeds.json    # tiny networks: to try it out

Training steps of R110 with 5 heads and with 1 (256 noisy images), and votes on noisy images of R110, R20 and R8 at
32x32 and of R50 at 224x224. The ways:

    authors'     eager, torch's own settings: `plain` in bench.py
    eager        train.py --no_cuda_graph, on a GPU
    ours         what train.py and certify_mhead.py run: on a GPU a step, or a pass, is a CUDA graph
    compiled     train.py --compile, on a GPU

`channels` is what a convolution with fewer is widened to (spacte.model.fused; 16: none is); where it is not given, the
library's own number. A row's `speed`, noisy images per second, is the median of three short measurements, `ms` what a
step or a batch takes, `gib` the most memory that was in use. Of a training step `first_seconds` is what the steps take
up to the first one that is fast, the graph's first replay, with all that is compiled; `next_epoch_seconds` what the
first two steps of the next epoch take, an eager one and the capture; `captured` whether it is a graph. Of certification
`error` is the relative error of the logits against those that the CPU computes in float32.

A row that fails, or that the time left cannot hold, says so under `failed` or `left_out`, and the others continue. The
JSON is written after every row. Where it is there already, of the same machine, versions and --tiny, its measured rows
stay and the missing ones are added.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import contextlib
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn

from bench_ways import Network, OurStep, OurVotes, authors_step, authors_votes, seconds_of, speed
from gpu_plan import read_speeds, rows_of
from spacte import cli
from spacte.device import select_device
from spacte.files import make_folder, replace_file
from spacte.logs.table import markdown
from spacte.model import fused
from spacte.precision import arithmetic, select_precision

_STEPS_TO_THE_FIRST_REPLAY = 3  # of an epoch; one or two are eager, see spacte.train.graph
_GUESSED_SECONDS = {"compiled": 40}  # of a row, where none like it has been measured
_GUESS = 6
_TURNS = 3
_SMALLER = {"R110": Network("R8", "digits", 2), "R20": Network("R8", "digits", 3)}  # for --tiny


@dataclass(frozen=True)
class Row:
    """What is measured; `batch_size` counts noisy images."""

    task: str
    way: str
    arch: str
    dataset: str
    heads: int
    precision: str | None = None  # None: the authors' way, in torch's own
    batch_size: int = 256
    channels: int | None = None

    @property
    def network(self) -> Network:
        """Whose speed it is."""
        return Network(self.arch, self.dataset, self.heads)


def main(given: list[str]) -> None:
    """Measure and print; `given` are the flags."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--seconds", type=cli.positive_float, default=100, help="for all rows together")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--tiny", action="store_true", help="tiny networks, to try it out")
    add("--json", type=Path, required=True, help="where the figures are written, after every row")
    args = parser.parse_args(given)
    device = select_device(args.device)
    make_folder(args.json.absolute().parent)
    speeds = _Speeds(device, args.seconds, args.tiny, args.json)
    print(", ".join(f"{name} {value}" for name, value in speeds.head.items()), flush=True)
    for row in rows(device, args.tiny):
        speeds.measure(row)
    found = pd.DataFrame(speeds.rows).drop(columns=["seconds", "arithmetic"], errors="ignore")
    print(f"\n{markdown(found.convert_dtypes())}")


def rows(device: torch.device, tiny: bool) -> list[Row]:
    """What is measured, what matters most first."""
    found = [_small(row) for row in _all_rows() if row.arch in _SMALLER] if tiny else list(_all_rows())
    if device.type != "cuda":  # where a CPU computes, `ours` is eager, nothing is widened, and tf32 is fp32
        found = [row for row in found if row.way not in ("eager", "compiled") and row.channels is None]
        found = [replace(row, precision="fp32") if row.precision == "tf32" else row for row in found]
    return list(dict.fromkeys(found))


def _small(row: Row) -> Row:
    small = _SMALLER[row.arch]
    batch_size = row.batch_size if row.task == "train" else max(16, row.batch_size // 64)
    heads = min(row.heads, small.heads)
    return replace(row, arch=small.arch, dataset=small.dataset, heads=heads, batch_size=batch_size)


def _all_rows() -> Iterator[Row]:
    five, one = ("R110", "CIFAR10", 5), ("R110", "CIFAR10", 1)
    votes = functools.partial(Row, "certify", "ours", *five)
    yield Row("train", "ours", *five, "bf16")
    yield Row("train", "ours", *one, "bf16")
    yield Row("train", "authors'", *five)
    yield Row("certify", "authors'", *five, batch_size=128)
    yield votes("bf16", 4096)
    yield Row("certify", "ours", *one, "bf16", 4096)
    yield Row("train", "authors'", *one)
    yield Row("train", "compiled", *five, "bf16")
    yield Row("train", "compiled", *one, "bf16")
    for channels in (16, 32, 64):
        yield votes("bf16", 4096, channels)
    yield votes("tf32", 4096)
    yield votes("bf16", 1000)
    yield votes("bf16", 16384)
    yield Row("train", "ours", *five, "tf32")
    yield Row("train", "eager", *five, "bf16")
    for arch, dataset, heads, batch_size in (
        ("R20", "CIFAR10", 5, 4096), ("R50", "ImageNet", 2, 256), ("R8", "CIFAR10", 5, 4096),
    ):  # fmt: skip
        yield Row("certify", "ours", arch, dataset, heads, "bf16", batch_size)
        yield Row("certify", "authors'", arch, dataset, heads, batch_size=128)
    for channels in (16, 32, 64):
        yield votes("tf32", 4096, channels)
    yield votes("fp32", 4096)
    yield Row("train", "ours", *one, "tf32")
    for heads in (five, one):
        for precision in ("bf16", "tf32"):
            if (heads, precision) != (five, "bf16"):
                yield Row("train", "eager", *heads, precision)
    for precision in ("tf32", "fp32"):
        for batch_size in (1000, 16384):
            yield votes(precision, batch_size)
    yield Row("train", "compiled", *five, "tf32")
    yield Row("train", "compiled", *one, "tf32")


class _Speeds:
    """Rows as they are measured, in `seconds` from now on, and the file that holds them."""

    def __init__(self, device: torch.device, seconds: float, tiny: bool, path: Path):
        self.device, self.path, self.end = device, path, time.monotonic() + seconds
        self.each = 0.02 if tiny else 0.3  # seconds of a measurement
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.head = {"device_name": name, "torch": torch.__version__, "cuda": torch.version.cuda}
        self.head |= {"cudnn": torch.backends.cudnn.version(), "tiny": tiny}
        head, before = read_speeds(path)  # what was measured here with these versions stands
        self.rows = rows_of(before) if head == self.head else []

    def measure(self, row: Row) -> None:
        """Add the row, with its figures or why it has none, unless it has been measured before."""
        known = asdict(row)
        if any(known.items() <= other.items() for other in self.rows):
            return
        started = time.monotonic()
        if self._needed(row) > self.end - started:
            figures = {"left_out": f"it needs about {self._needed(row):.0f} s"}
        else:
            figures = _figures_of(row, self.device, self.each) | {"seconds": time.monotonic() - started}
        self.rows.append(known | figures)
        shown = {name: value for name, value in self.rows[-1].items() if value is not None and name != "arithmetic"}
        print(", ".join(f"{name} {_text(value)}" for name, value in shown.items()), flush=True)
        content = json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n"
        replace_file(self.path, content)

    def _needed(self, row: Row) -> float:
        """The most seconds that a row like it took, or a guess."""
        like = {name: value for name, value in asdict(row).items() if name in ("task", "way", "arch")}
        took = [one["seconds"] for one in self.rows if "speed" in one and like.items() <= one.items()]
        return max(took, default=_GUESSED_SECONDS.get(row.way, _GUESS))


def _figures_of(row: Row, device: torch.device, seconds: float) -> dict:
    """The row's figures, each measured for about that many seconds, or why there are none."""
    torch.manual_seed(0)
    measure = _train if row.task == "train" else _certify
    widened = mock.patch.object(fused, "_CHANNELS", row.channels) if row.channels else contextlib.nullcontext()
    try:
        with widened:
            return measure(row, device, seconds)
    except Exception as error:  # whatever it is, the other rows are measured
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    finally:
        _give_memory_back(device, row.way == "compiled")


def _train(row: Row, device: torch.device, seconds: float) -> dict:
    if row.way == "authors'":
        return _measured(authors_step(row.network, row.batch_size, device), row, device, seconds)
    compiled = row.way == "compiled"
    select_device(str(device), compiled)  # raises where nothing can be compiled
    select_precision(row.precision, device)
    step = OurStep(row.network, row.batch_size, device, row.precision, compiled, graphs=row.way != "eager")
    first = seconds_of(step, _STEPS_TO_THE_FIRST_REPLAY, device)
    figures = _measured(step, row, device, seconds)
    step.epoch += 1
    figures |= {"first_seconds": first, "next_epoch_seconds": seconds_of(step, 2, device)}
    return figures | {"captured": step.captured}


def _certify(row: Row, device: torch.device, seconds: float) -> dict:
    if row.way == "authors'":
        return _measured(authors_votes(row.network, row.batch_size, device), row, device, seconds)
    select_precision(row.precision, device)
    classifier, images, expected = _reference(row.network)
    votes = OurVotes(row.network, row.batch_size, device, row.precision, classifier=classifier)
    with torch.inference_mode():
        logits = votes.frozen(images.to(device)).cpu()
    figures = {"error": float((logits - expected).norm() / expected.norm())}
    figures |= _measured(votes, row, device, seconds)
    return figures | {"images_a_pass": votes.frozen.pass_size(images)}


@functools.cache
@torch.inference_mode()
def _reference(network: Network) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network, some images, and its logits in float32 on the CPU."""
    classifier, images = network.build().eval(), torch.rand(16, *network.spec.shape)
    return classifier, images, classifier(images)


def _measured(way, row: Row, device: torch.device, seconds: float) -> dict:
    """Speed and memory of a way whose call takes a batch."""
    way()
    found = statistics.median(speed(way, row.batch_size, device, seconds) for _ in range(_TURNS))
    figures = {"speed": found, "ms": 1e3 * row.batch_size / found}
    if device.type == "cuda":
        figures["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if row.precision:
        figures["arithmetic"] = arithmetic()
    return figures


def _give_memory_back(device: torch.device, compiled: bool) -> None:
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
