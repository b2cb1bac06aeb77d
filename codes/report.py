"""Read certification logs: tables, comparisons, pictures, and one page with all of them.

python codes/report.py LOG... [FOLDER...]                       # a table; a folder stands for all logs in it
python codes/report.py FOLDER --envelope --format latex         # for a paper, with the best over sigma
python codes/report.py FOLDER --members                         # what an ensemble's vote adds to its heads or networks
python codes/report.py FOLDER --by_class 0.5                    # each class's certified accuracy at 0 and at 0.5
python codes/report.py FOLDER --over_seeds                      # the seeds of one experiment as one row, one curve
python codes/report.py FOLDER --norm linf --radii 2/255 8/255   # what the certificates are worth in Linf (or l1)
python codes/report.py FOLDER --top_k 3 --certificate all-votes # that the label is among the 3 classes of most votes
python codes/report.py --compare A.log B.log                    # what the same images say of the difference
python codes/report.py --compare FOLDER_A FOLDER_B              # of two experiments: the runs of their seeds
python codes/report.py LOG... --baseline SINGLE.log             # each against one
python codes/report.py LOG... --curves curves.pdf --html report.html
python codes/report.py --training runs/<...>/<run> training.png

Shares are in [0, 1], an ACR stands with its standard error (--over_seeds: with the deviation of the runs' ACRs), a
column titled with a radius holds the certified accuracy there, and the best of each column is bold: within the rows of
one `group`, which certify the same images with the same N0, N, alpha, --sequential, --skip_wrong, --exact_noise and
--precision. Logs without a configuration are a group of their own; the column is there where there are two groups.

A run is named after the folders that tell its log from the others (5-heads/seed-1), or else after its flags. Each
interval of a comparison is for its row alone; `p_holm` is the p-value of no difference, adjusted for all rows.
`draws` is the mean number of an image's estimation draws, where runs differ in it. Of a run that stops early
(--sequential) the ACR is a lower bound, marked ≥, and a radius that its rule did not decide shows "-".
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports

from spacte.report import command

if __name__ == "__main__":
    command.main(__doc__)
