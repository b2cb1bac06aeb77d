"""A model of RobustBench's zoo as --classifier. It was not trained for noise: see what it certifies.

python codes/certify_mhead.py --classifier codes/examples/from_robustbench.py:build \
    --classifier_args model=Wong2020Fast threat_model=Linf --dataset CIFAR10 --noise_sd 0.12 --skip 20

The weights are downloaded, or lie in <model_dir>/<dataset>/<threat_model>/<model>.pt. RobustBench needs setuptools
below 81. Its release on PyPI asks for pyautoattack and imports autoattack, which are the same.
"""

import importlib.util
import sys

from torch import nn

if importlib.util.find_spec("autoattack") is None:
    import pyautoattack

    sys.modules["autoattack"] = pyautoattack

from robustbench.utils import load_model


def build(model: str, threat_model: str = "Linf", dataset: str = "cifar10", model_dir: str = "./models") -> nn.Module:
    """RobustBench's networks take images in [0, 1]: their normalisation is in them."""
    return load_model(model_name=model, model_dir=model_dir, dataset=dataset, threat_model=threat_model)
