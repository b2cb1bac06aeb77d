"""Strip a training checkpoint to what certification needs: weights, data set, recipe; a fifth of the size or less.

python release.py save/<...>/epoch150.pth --output gaussian-5-heads.pth
python release.py save/<...>/epoch150.pth --output gaussian-5-heads.pth --half

It is certified like the checkpoint, by certify_mhead.py --model_path, and cannot be trained further. --half keeps the
weights as 16-bit floating point: another network, whose figures must be certified again.
"""

from spacte.train import release

if __name__ == "__main__":
    release.main(__doc__)
