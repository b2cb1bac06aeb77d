"""Scripts in processes of their own: none outlives its test, and none makes it wait for ever."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CODES = Path(__file__).parent.parent / "codes"
# A server that has imported what takes long, and runs nothing itself, is forked for each child: this process has
# threads, and a fork of it may wait for ever for a lock that one of them held.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch", "torchvision", "pandas", "scipy.stats", "sklearn.datasets", "torch.utils.tensorboard"]
)


def run(command, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """A command's exit code and output. TimeoutExpired after `timeout` seconds, and then nothing of it is left."""
    command = [str(part) for part in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes, **options) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Children:
    """`world` processes that run a script from a folder as torchrun starts them, without importing torch again.

    with Children(tmp_path, "0Gaussian/train.py", "--epochs", 1) as children:
        assert children.exit_codes() == [0]

    What they print is added to the file `output`.
    """

    def __init__(self, folder: Path, script: str, *flags, world: int = 1, output: str | Path = os.devnull):
        command, port = [str(part) for part in (CODES / script, *flags)], free_port()
        self.processes = [
            _SERVER.Process(target=_run, args=(folder, command, rank, world, port, output)) for rank in range(world)
        ]

    def __enter__(self) -> "Children":
        for process in self.processes:
            process.start()
        return self

    def exit_codes(self, timeout: float = 120) -> list[int | None]:
        """Wait for their ends; None for a process that has not ended within `timeout` seconds."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL, all at once."""
        for process in self.processes:
            process.kill()

    def __exit__(self, *error) -> None:
        self.kill()
        for process in self.processes:
            process.join()


def _run(folder, command, rank, world, port, output):
    """A process's whole life, without pytest's output."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115 - for good
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent), str(CODES)]
    runpy.run_path(command[0], run_name="__main__")


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for yet has ended."""
    try:
        os.kill(pid, 0)
        return sys.platform != "linux" or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_for(condition, seconds=60):
    """Return once the condition holds; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
