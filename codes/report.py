"""Read certification logs: tables, comparisons, pictures, and one page with all of them.

python codes/report.py LOG... [FOLDER...]                       # a table; a folder stands for all logs in it
python codes/report.py FOLDER --envelope --format latex         # for a paper, with the best over sigma
python codes/report.py FOLDER --members                         # what an ensemble's vote adds to its heads or networks
python codes/report.py FOLDER --by_class 0.5                    # each class's certified accuracy at 0 and at 0.5
python codes/report.py FOLDER --over_seeds                      # the seeds of one experiment as one row, one curve
python codes/report.py FOLDER --norm linf --radii 2/255 8/255   # what the certificates are worth in Linf (or l1)
python codes/report.py FOLDER --top_k 3 --certificate all-votes # that the label is among the 3 classes of most votes
python codes/report.py --compare A.log B.log                    # the paired difference on the same images
python codes/report.py --compare FOLDER_A FOLDER_B              # of two experiments: the runs of their seeds
python codes/report.py LOG... --baseline SINGLE.log             # each against one
python codes/report.py LOG... --curves curves.pdf --html report.html
python codes/report.py --training runs/<...>/<run> training.png
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports
    from spacte.report import command

    command.main(__doc__)
