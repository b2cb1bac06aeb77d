"""An ONNX file run by ONNX Runtime as --classifier, on the CPU or a GPU.

python codes/certify_mhead.py --classifier codes/examples/onnx_runtime.py:build \
    --classifier_args path=network.onnx --dataset CIFAR10 --noise_sd 0.25 --skip 20

The file's first input must be float32 images [N, C, H, W] in [0, 1] with a free N, and its first output logits [N, K].
No gradient reaches the images: attack_mhead.py refuses it.
"""

from collections.abc import Callable

import onnxruntime
import torch
from torch import Tensor

from spacte.files import sha256
from spacte.utils import UserError


def build(path: str) -> Callable[[Tensor], Tensor]:
    """The network of the file, with the providers that this ONNX Runtime was built with."""
    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    name, sizes = session.get_inputs()[0].name, session.get_inputs()[0].shape
    if isinstance(sizes[0], int):
        raise UserError(f"'{path}' takes batches of {sizes[0]} images: export it with a free first dimension")

    def classify(images: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, K]."""
        (logits,) = session.run([session.get_outputs()[0].name], {name: images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    # a resumed run looks at a callable's tensors to know that it is the same
    classify.weights = torch.frombuffer(bytearray.fromhex(sha256(path)), dtype=torch.uint8)
    return classify
