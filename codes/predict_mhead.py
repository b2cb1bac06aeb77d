"""Predict test images with a smoothed multi-head classifier, abstaining where it is close (Cohen et al., ICML 2019).

python predict_mhead.py --model_path save/CIFAR10/R110/noise-0.25/<run>/epoch150.pth --skip 20 --N 1000
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports
    from spacte.certify import predict

    predict.main(__doc__)
