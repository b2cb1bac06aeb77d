"""Five heads and one on the embedded digits, from training to the table: what `make demo` runs.

cd codes/0Gaussian && python ../demo.py
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPE = shlex.split(
    "--dataset digits --arch R8 --noise_sd 0.5 --num_noise_vec 2 --batch_size 128 --epochs 40 --lr_step_size 14 "
    "--lbdlast 0.8 --save_freq 40 --resume --device cpu"
)
TAIL = Path("digits/R8/noise-0.50")
RUN = "h-{}-eps-0.8-m-2-lbdlast-0.8"


def _step(live: bool, script: str, *flags: str) -> None:
    """Run a script; what it prints appears at once if `live`, otherwise when it is through."""
    title = f"\n$ cd codes/0Gaussian; python {script} {' '.join(flags)}"
    command = [sys.executable, script, *flags]
    if live:
        print(title, flush=True)
        subprocess.run(command, check=True)
    else:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{title}\n{done.stdout}", end="", flush=True)
        done.check_returncode()


def _train_and_certify(heads: int, live: bool) -> str:
    """Returns the certification log."""
    _step(live, "train.py", *RECIPE, "--num_heads", str(heads))
    model = Path("save") / TAIL / RUN.format(heads) / "epoch40.pth"
    _step(live, "certify_mhead.py", "--model_path", str(model), "--N", "1000", "--device", "cpu")
    return str(Path("logs") / TAIL / "certify-mhead" / f"{RUN.format(heads)}-certify-skip-1.log")


def _main() -> None:
    os.chdir(Path(__file__).parent / "0Gaussian")
    with ThreadPoolExecutor() as both:  # one head beside five: each takes one core
        baseline = both.submit(_train_and_certify, 1, live=False)
        ensemble = both.submit(_train_and_certify, 5, live=True)
    _step(True, "../report.py", baseline.result(), ensemble.result(), "--heads")


if __name__ == "__main__":
    try:
        _main()
    except subprocess.CalledProcessError as error:  # the step has said why
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
