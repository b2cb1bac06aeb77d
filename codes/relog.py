"""Certify the same votes otherwise, in seconds: at another alpha, for one head alone, for top k.

The counts beside a log are read, and another log is written beside it.

python codes/relog.py logs/<...>-certify-skip-20.log --alpha 0.01
python codes/relog.py logs/<...>-certify-skip-20.log --top_k 5 --certificate all-votes
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports
    from spacte.certify import relog

    relog.relog_main(__doc__)
