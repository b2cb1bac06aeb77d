"""Attack a certification log's images through the noise (PGD in L2, Salman et al., NeurIPS 2019) at given radii.

python attack_mhead.py --model_path save/<...>/epoch150.pth --log logs/<...>-certify-skip-20.log --radii 0.25 0.5
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports
    from spacte.certify import attack

    attack.main(__doc__)
