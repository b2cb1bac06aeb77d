"""Five heads and one on the embedded digits, from training to the table: what `make demo` runs.

cd codes/0Gaussian && python ../demo.py
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

RECIPE = shlex.split(
    "--dataset digits --arch R8 --noise_sd 0.5 --num_noise_vec 2 --batch_size 128 --epochs 40 --lr_step_size 14 "
    "--lbdlast 0.8 --save_freq 40 --resume --device cpu"
)
TAIL = Path("digits/R8/noise-0.50")
RUN = "h-{}-eps-0.8-m-2-lbdlast-0.8"
HEADS = (1, 5)


def _step(script: str, *flags: str) -> None:
    print(f"\n$ cd codes/0Gaussian; python {script} {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, script, *flags], check=True)


def _main() -> None:
    os.chdir(Path(__file__).parent / "0Gaussian")
    for heads in HEADS:
        _step("train.py", *RECIPE, "--num_heads", str(heads))
        model = Path("save") / TAIL / RUN.format(heads) / "epoch40.pth"
        _step("certify_mhead.py", "--model_path", str(model), "--N", "1000", "--device", "cpu")
    logs = [Path("logs") / TAIL / "certify-mhead" / f"{RUN.format(heads)}-certify-skip-1.log" for heads in HEADS]
    _step("../report.py", *map(str, logs), "--heads")


if __name__ == "__main__":
    try:
        _main()
    except subprocess.CalledProcessError as error:  # the step has said why
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
