"""Strip a training checkpoint to what certification needs: weights, data set, recipe; about half the size.

python release.py save/<...>/epoch150.pth --output gaussian-5-heads.pth
python release.py save/<...>/epoch150.pth --output gaussian-5-heads.pth --half
python release.py save/<...>/epoch150.pth --output gaussian-5-heads.pth --int8 ./data

It is certified like the checkpoint, by certify_mhead.py --model_path, and cannot be trained further. --half keeps the
weights as 16-bit floating point: another network, whose figures must be certified again. With --int8 the file holds
what certify_mhead.py --precision int8 would otherwise measure on training images, which are then not needed.
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports
    from spacte.train import release

    release.main(__doc__)
