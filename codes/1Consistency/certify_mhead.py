"""Certify a multi-head smoothed classifier's test images with one-sided Clopper-Pearson bounds (Cohen et al., 2019).

python certify_mhead.py --model_path save/CIFAR10/R110/noise-0.25/<run>/epoch150.pth --skip 20
"""

from spacte import certification

if __name__ == "__main__":
    certification.main(__doc__)
