"""Certify the same votes at another alpha, or for one head alone, in seconds: a log from the counts beside a log.

python codes/relog.py logs/<...>-certify-skip-20.log --alpha 0.01
"""

from spacte.certify import relog

if __name__ == "__main__":
    relog.relog_main(__doc__)
