"""What every part needs and none owns: user errors, device and processes, seeds, files that are never half written."""

import atexit
import contextlib
import hashlib
import importlib.util
import os
import platform
import warnings
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "statsmodels", "pandas", "scikit-learn")


class UserError(ValueError):
    """A wrong flag, file or folder; its text is one line that names the legal values."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that its one line tells."""


# --- device and processes --------------------------------------------------------------------------------------------


def process_rank() -> int:
    """This process's number among those of `torchrun`; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> None:
    """Join the processes that `torchrun` started (gloo between CPUs, nccl between GPUs); nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # one process may wait long for a slow one
        atexit.register(dist.destroy_process_group)


def share_from_main_process(make):
    """`make()` of the main process, in every process; the UserError that it raises there is raised in every one."""
    box = [None]
    if process_rank() == 0:
        try:
            box = [make()]
        except UserError as error:
            box = [error]
    if process_count() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def main_process_first(make):
    """`make()` in every process, in the main one first: what it leaves on disk is there for the others."""
    made = []
    share_from_main_process(lambda: made.append(make()))
    return made[0] if made else make()


def gather_from_processes(value) -> list:
    """Every process's value, in order of rank."""
    values = [value]
    if process_count() > 1:
        values = [None] * process_count()
        dist.all_gather_object(values, value)
    return values


def wait_for_processes() -> None:
    """Return once every process is here."""
    gather_from_processes(None)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The processes' mean of a tensor without gradient; itself where there is one process."""
    if process_count() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= process_count()
    return values


def from_main_process(values: torch.Tensor) -> torch.Tensor:
    """The tensor, overwritten in every process by the main process's; itself where there is one process."""
    if process_count() > 1:
        dist.broadcast(values, src=0)
    return values


def select_device(name: str, compiled: bool = False) -> torch.device:
    """The device called `name`: auto (CUDA where there is one), cpu, cuda or cuda:<index>; torchrun's own GPU for cuda.

    float32 means IEEE float32 from here on (no TF32), and cuDNN chooses deterministic algorithms, so that the
    precision in a log is the one that ran. Raises UserError for a device that does not exist, and where networks are
    to be `compiled` for it but there is no compiler.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device '{name}': choose from auto, cpu, cuda, cuda:<index>")
    if device.type == "cuda":
        if device.index is not None and process_count() > 1:
            raise UserError(f"--device {name} would put every process on one GPU: give --device cuda")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        count = torch.cuda.device_count()
        if device.index >= count:
            wanted = f"{device}, for torchrun's process {device.index}," if "LOCAL_RANK" in os.environ else f"'{name}'"
            raise UserError(f"there is no device {wanted} here: {count} CUDA devices are visible; use --device cpu")
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if compiled:
        _check_compiler(device)
    return device


def _check_compiler(device: torch.device) -> None:
    from torch._inductor import cpp_builder  # here: importing it takes a second

    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # that they are off is our choice
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU")
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        raise UserError("--compile needs a C++ compiler: install g++, or name one in the variable CXX") from error


def arithmetic() -> dict[str, bool | str]:
    """The settings that decide how the network's arithmetic rounds, as they are in force, for the record."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks run: bfloat16 convolutions and products for "bf16", none for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# --- seeds -----------------------------------------------------------------------------------------------------------


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a function of the purpose and the numbers (0 to 2^64 - 1) alone, mixed by SeedSequence.

    torch's CPU generator keeps 32 bits of it: that two of 10,000 images share their noise has a chance of 1 %, which
    no image's certificate depends on.
    """
    words = [len(purpose), *purpose.encode()]
    for number in numbers:
        words += [number & 0xFFFFFFFF, number >> 32]
    return int(np.random.SeedSequence([len(words), *words]).generate_state(1, np.uint64)[0] >> 1)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's default generators: on the CPU and, if it is another one, on the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Set torch's default generators to states that `rng_state` returned."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


# --- files -----------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents; UserError where this is not possible or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{folder}': {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to '{folder}': permission denied")
    return folder


def replace_file(path: Path, write) -> None:
    """Call `write(temporary path)` and rename the result to `path`: a reader sees the old file or the whole new one.

    Raises UserError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never there
            temporary.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_sha256(*files: str) -> str:
    """The SHA-256 of this library's source, and of the .py files that lie beside each of `files`."""
    library, digest = Path(__file__).parent, hashlib.sha256()
    sources = sorted(library.rglob("*.py"))
    for file in files:
        sources += sorted(Path(file).parent.glob("*.py"))
    for source in sources:
        digest.update(f"{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that a result may depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def check_ending(path: Path, endings: tuple[str, ...]) -> None:
    """UserError where the path has none of the endings."""
    if path.suffix not in endings:
        raise UserError(f"'{path}' must end in {', '.join(endings)}")


def run_tail(dataset: str, arch: str, noise_sd: float) -> Path:
    """The part that all of a run's folders share: <dataset>/<arch>/noise-<sd>, sd with at least two decimals."""
    two_decimals = f"{noise_sd:.2f}"
    return Path(dataset, arch, f"noise-{two_decimals if float(two_decimals) == noise_sd else noise_sd}")
