"""The commands of the installed library: what the scripts in codes/ are in a checkout.

Each imports what it runs when it is called, so that reading logs loads no torch.
"""

import inspect
from collections.abc import Callable

import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports


def certify() -> None:
    """Certify test images of a smoothed classifier: of a checkpoint, of an ensemble of several, or of your own.

    spacte-certify --model_path save/<...>/epoch150.pth --skip 20
    spacte-certify --model_path checkpoint.pth.tar --dataset CIFAR10 --noise_sd 0.25 --skip 20
    spacte-certify --classifier my_models.py:build --dataset CIFAR10 --noise_sd 0.25 --skip 20
    spacte-certify ... --shard 1/8       # one job of eight; spacte-merge joins their logs
    spacte-certify ... --sequential      # stop each image's draws as soon as its radii are decided
    """
    from spacte.certify.certify import main

    main(_description(certify))


def predict() -> None:
    """Predict test images with a smoothed classifier, abstaining where it is close (Cohen et al., ICML 2019).

    spacte-predict --model_path save/<...>/epoch150.pth --skip 20 --N 1000
    """
    from spacte.certify.predict import main

    main(_description(predict))


def attack() -> None:
    """Attack a certification log's images through the noise (PGD in L2, Salman et al., NeurIPS 2019) at given radii.

    spacte-attack --model_path save/<...>/epoch150.pth --log logs/<...>-certify-skip-20.log --radii 0.25 0.5
    """
    from spacte.certify.attack import main

    main(_description(attack))


def report() -> None:
    """Read certification logs: tables, comparisons, pictures, one page of all of it.

    spacte-report LOG... [FOLDER...]                # a table; a folder stands for all logs in it
    spacte-report FOLDER --over_seeds               # the seeds of one experiment as one row, one curve
    spacte-report FOLDER --members --by_class 0.5   # what the vote adds to its heads; each class's certified accuracy
    spacte-report --compare A.log B.log             # the paired difference on the same images; or of two folders
    spacte-report LOG... --curves curves.pdf --html report.html
    """
    from spacte.report.command import main

    main(_description(report))


def relog() -> None:
    """Certify the same votes otherwise, in seconds: at another alpha, for one head alone, for top k.

    spacte-relog logs/<...>-certify-skip-20.log --alpha 0.01
    """
    from spacte.certify.relog import relog_main

    relog_main(_description(relog))


def merge() -> None:
    """Join the logs of a run's shards into the one log that they are parts of.

    spacte-merge logs/<...>-shard-*-of-8.log
    """
    from spacte.certify.relog import merge_main

    merge_main(_description(merge))


def _description(command: Callable[[], None]) -> str:
    return inspect.getdoc(command) or ""
