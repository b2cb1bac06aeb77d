"""Noisy images per second, for certification and for a training step, against what the authors' code does.

    python codes/bench/bench.py                                    # R20 and R110 at 32x32, R8 on digits, 5 heads
    python codes/bench/bench.py --task certify --arch R110 --precision bf16 --device cuda --batch_size 4096
    python codes/bench/bench.py --task table --model_path save/<...>/epoch150.pth           # bench_table.py
    python codes/bench/bench.py --task speeds --seconds 100 --device cuda --json out.json    # bench_speeds.py

`plain` is the authors' way: eager float32 with torch's own settings (on a GPU, TF32 convolutions), contiguous tensors,
BatchNorm unfolded; in certification batches of 128 noisy images, their default, noise on a repeated image, and votes
counted one by one on the host; in training a Python loop over heads and noise vectors, a loop over the pairs of heads
for the cosine term, and the losses fetched at every step. `fast` is what certify_mhead.py and train.py run. The two
take turns in one process, and `ratio` is the median of the turns' ratios (`spread`: smallest and largest). Images are
random: speed does not depend on them.

`ceiling_fraction` is the share of the hardware's limit that `fast` reaches: the least time that its work can take,
divided by the time it took. The least time is the longer one of two: of its convolutions and products at the speed of a
large matrix product or a large 3x3 convolution, whichever is faster here, in the same precision; and of reading every
layer's input and weights and writing its output once at the speed of a large copy. These speeds are measured after each
case, and the best ones count.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

import argparse
import contextlib
import json
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bench_speeds
import bench_table
from bench_ways import Network, OurStep, OurVotes, authors_step, authors_votes, speed
from spacte import cli
from spacte.device import select_device
from spacte.files import make_folder, replace_file
from spacte.logs.table import markdown
from spacte.precision import INFERENCE_PRECISIONS, select_precision
from spacte.provenance import package_versions, source_state
from spacte.utils import UserError

_OWN_FLAGS = {"table": bench_table.main, "speeds": bench_speeds.main}  # tasks that have flags of their own
_DEFAULT_CASES = (("R20", "CIFAR10"), ("R110", "CIFAR10"), ("R8", "digits"))


def _flags() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--task",
        nargs="+",
        choices=("certify", "train", *_OWN_FLAGS),
        default=["certify", "train"],
        help=f"what is measured; {' and '.join(_OWN_FLAGS)} alone",
    )
    add("--arch", nargs="+", help="architectures, with --dataset (R20 and R110 on CIFAR10, R8 on digits)")
    add("--dataset", help="whose image size and classes are used, with --arch (default: CIFAR10); no data are read")
    add("--num_heads", type=cli.positive_int, default=5, help="L")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    fast = "of the fast way; plain is torch's own float32; int8 is of certification alone"
    add("--precision", choices=INFERENCE_PRECISIONS, default="auto", help=fast)
    add("--compile", action="store_true", help="the fast way with --compile")
    add("--batch_size", type=cli.positive_int, help="noisy images per batch (default: certify 1000, train 256)")
    add("--plain_batch_size", type=cli.positive_int, default=128, help="noisy images per batch of plain certification")
    add("--turns", type=cli.positive_int, default=5, help="measurements of each way")
    add("--seconds", type=cli.positive_float, default=2.0, help="least time of a measurement")
    add("--json", type=Path, help="also write the figures there")
    add(
        "--markdown",
        type=Path,
        metavar="FILE.md",
        help="also add a dated record there: machine, commit, command, table",
    )
    return parser.parse_args()


def _main() -> None:
    tasks = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    tasks.add_argument("--task", nargs="*")
    asked, others = tasks.parse_known_args()
    if asked.task and len(asked.task) == 1 and asked.task[0] in _OWN_FLAGS:
        _OWN_FLAGS[asked.task[0]](others)
        return
    args = _flags()
    for task in args.task:
        if task in _OWN_FLAGS:
            raise UserError(f"--task {task} has flags of its own: give it alone")
    if args.dataset and not args.arch:
        raise UserError("--dataset needs --arch: without it R20 and R110 on CIFAR10 and R8 on digits are measured")
    if args.precision == "int8" and (args.compile or args.task != ["certify"]):
        raise UserError("--precision int8 needs --task certify, without --compile")
    device = select_device(args.device, args.compile)
    args.precision = select_precision(args.precision, device)
    for path in filter(None, (args.json, args.markdown)):
        make_folder(path.absolute().parent)  # before, not after, the measurements
    cases = [(arch, args.dataset or "CIFAR10") for arch in args.arch] if args.arch else _DEFAULT_CASES
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, {torch.get_num_threads()} threads", flush=True)
    rows, limits = [], []
    for task in args.task:
        for arch, dataset in cases:
            batch_size = args.batch_size or (1000 if task == "certify" else 256)
            plain_batch_size = args.plain_batch_size if task == "certify" else batch_size
            network = Network(arch, dataset, args.num_heads)
            plain, ours = (authors_votes, OurVotes) if task == "certify" else (authors_step, OurStep)
            ways = (
                plain(network, plain_batch_size, device),
                ours(network, batch_size, device, args.precision, args.compile),
            )
            row = {"task": task, "arch": arch, "dataset": dataset, "heads": args.num_heads}
            row |= {"device": device.type, "device_name": name, "precision": args.precision, "batch_size": batch_size}
            row["plain_batch_size"] = plain_batch_size
            rows.append(row | _compare(*ways, (plain_batch_size, batch_size), device, args))
            limits.append(_ceilings(device, args.precision, args.seconds / 4))
            print(f"{task} {arch}: {rows[-1]['ratio']:.2f}", flush=True)
    flops, copied = (max(speeds) for speeds in zip(*limits, strict=True))  # other programs only slow it down
    limit = f"limit: {flops / 1e9:.0f} GFLOP/s in {args.precision}, {copied / 1e9:.0f} GB/s copied"
    print(limit)
    for row in rows:
        cost = _work(Network(row["arch"], row["dataset"], row["heads"]), args.precision)
        passes = 3 if row["task"] == "train" else 1  # the backward pass costs twice the forward one
        row["gflops"] = passes * cost["flop"] * row["fast"] / 1e9
        row["ceiling_fraction"] = passes * max(cost["flop"] / flops, cost["bytes"] / copied) * row["fast"]
    table = markdown(pd.DataFrame(rows).drop(columns=["device", "device_name"]))
    print(table)
    if args.json:
        replace_file(args.json, json.dumps(rows, indent=2) + "\n")
    if args.markdown:
        _add_record(args.markdown, device, f"{limit}\n\n{table}")


def _add_record(path: Path, device: torch.device, found: str) -> None:
    """Add the day, the machine, the commit, the command and what was found to a file of records."""
    versions, source = package_versions(), source_state(__file__)
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())  # not on ARM
        processor = named[1] if named else processor
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    capability = "" if device.type == "cuda" else f", {torch.backends.cpu.get_cpu_capability()}"
    commit = f"{str(source['commit'])[:7]}{', with changes' if source['dirty'] else ''}"
    text = (
        f"## {datetime.now(UTC):%Y-%m-%d}\n\n{machine}{capability}, {torch.get_num_threads()} threads; Python "
        f"{versions['python']}, torch {versions['torch']}; commit {commit}.\n\n```\n"
        f"python codes/bench/bench.py {shlex.join(sys.argv[1:])}\n```\n\n{found}\n"
    )
    before = f"{path.read_text().rstrip()}\n\n" if path.exists() else ""
    replace_file(path, before + text)


def _compare(plain: Callable, fast: Callable, sizes: tuple[int, int], device: torch.device, args) -> dict:
    """Noisy images per second of the two ways (medians) and their ratio turn by turn; a call processes a batch."""
    for way in (plain, fast):
        for _ in range(3):  # warm up: allocations, the library's choice of kernels, recording a CUDA graph
            way()
    turns = [
        [speed(way, size, device, args.seconds) for way, size in zip((plain, fast), sizes, strict=True)]
        for _ in range(args.turns)
    ]
    ratios = [fast_speed / plain_speed for plain_speed, fast_speed in turns]
    figures = {"plain": statistics.median(t[0] for t in turns), "fast": statistics.median(t[1] for t in turns)}
    return figures | {"ratio": statistics.median(ratios), "spread": f"{min(ratios):.2f}-{max(ratios):.2f}"}


# --- the hardware's limit ---


def _ceilings(device: torch.device, precision: str, seconds: float) -> tuple[float, float]:
    """FLOP/s of a large matrix product or convolution in the precision, bytes/s (read and written) of a large copy.

    Of the two kinds of products, which may come from two libraries, the faster one counts.
    """
    size, images = (8192, 512) if device.type == "cuda" else (2048, 8)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    convolution = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(images, 256, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
    flop = 2 * convolution.weight.numel() * x.numel() // 256
    source = torch.randn(size * size * (4 if device.type == "cuda" else 8), device=device)  # 1 GiB, 128 MiB
    target = torch.empty_like(source)
    ways = [(lambda: a @ b, 2 * size**3), (lambda: convolution(x), flop)]
    if precision == "int8":
        ways = [(_int8_convolution(x), flop)]
    with torch.inference_mode():
        products = max(speed(way, flop, device, seconds) for way, flop in ways for _ in range(3))
    copies = max(speed(lambda: target.copy_(source), 2 * source.nbytes, device, seconds) for _ in range(3))
    return products, copies


def _int8_convolution(x: Tensor) -> Callable[[], Tensor]:
    """A convolution of x [N, 256, H, W] to as many channels, 3x3, as int8 computes it."""
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    weight, scales = torch.randint(-64, 65, (256, 256, 3, 3), dtype=torch.int8), torch.ones(256)
    x, zeros, bias = x.clamp(0, 255).to(torch.uint8), torch.zeros(256, dtype=torch.int64), torch.zeros(256)
    packed = torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 0, *geometry, list(x.shape))
    operands = (x, 1.0, 0, packed, scales, zeros, bias, *geometry, 1e4, 0, torch.uint8, "relu", [], "")
    return lambda: torch.ops.onednn.qconv2d_pointwise(*operands)


def _work(network: Network, precision: str) -> dict[str, float]:
    """FLOP of one image's forward pass, and the bytes of every layer's input, weights and output moved once."""
    classifier = network.build().eval()
    bytes_per_number, moved, batch = {"bf16": 2, "int8": 1}.get(precision, 4), 0, 16

    def note(module, inputs, output):
        """Add a layer's numbers to `moved`."""
        nonlocal moved
        weights = sum(parameter.numel() for parameter in module.parameters())
        moved += inputs[0].numel() + output.numel() + weights

    for module in classifier.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier(torch.rand(batch, *network.spec.shape))
    return {"flop": counter.get_total_flops() / batch, "bytes": moved * bytes_per_number / batch}


if __name__ == "__main__":
    cli.run(_main)
