"""Certify test images of a smoothed classifier (Cohen et al., ICML 2019): of a checkpoint, of several, or of your own.

python certify_mhead.py --model_path save/CIFAR10/R110/noise-0.25/<run>/epoch150.pth --skip 20
python certify_mhead.py --model_path checkpoint.pth.tar --dataset CIFAR10 --noise_sd 0.25     # a published one
python certify_mhead.py --classifier my_models.py:build --dataset CIFAR10 --noise_sd 0.25     # any other
torchrun --nproc_per_node=4 -- certify_mhead.py ...     # one run, divided among 4 processes
python certify_mhead.py ... --shard 1/8                 # one job of eight; merge_logs.py joins their logs
python certify_mhead.py ... --sequential                # stop each image's draws as soon as its radii are decided
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports
    from spacte.certify import certify

    certify.main(__doc__)
