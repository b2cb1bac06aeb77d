"""What torchrun's processes do together is what one process does alone."""

import pytest
import torch
from children import CODES, Children

# An optimiser step on seven images, with noise that is a function of the image, by the statistics that BatchNorm has.
STEP = """
import sys
sys.path.insert(0, "tests")

import torch
from objectives import objective_of

from spacte.data.sources import open_split
from spacte.distributed import get_rank, get_world_size, init_distributed
from spacte.model import build_classifier
from spacte.train.trainer import Trainer

defence, count, *flags = sys.argv[1:]
init_distributed()
torch.manual_seed(3)
objective = objective_of(defence, "--dataset", "digits", "--arch", "R8", "--num_heads", 3, "--eps", 0.3, *flags)
objective.draw_noises = lambda images: torch.stack([torch.sin(900 * m * images) for m in (1, 2)]) / 2
digits = open_split("digits", "", True)
trainer = Trainer(objective.recipe, objective, build_classifier("R8", "digits", 3), torch.device("cpu"), digits, digits)
for module in trainer.classifier.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.running_var.fill_(2.0)
trainer.classifier.eval()
images, labels = digits.evenly_spaced(int(count))
mine = slice(get_rank(), None, get_world_size())
trainer.step(images[mine], labels[mine], 150)
if get_rank() == 0:
    torch.save([parameter.detach() for parameter in trainer.classifier.parameters()], "after.pt")
"""


@pytest.mark.parametrize(("defence", "count"), [("0Gaussian", 8), ("0Gaussian", 7), ("1Consistency", 7), ("4MACER", 7)])
def test_a_step_of_two_processes_is_that_of_one(tmp_path, defence, count):
    """Also where one has an image more: 4 and 3 of 7."""
    (tmp_path / "step.py").write_text(STEP.replace('"tests"', repr(str(CODES.parent / "tests"))))
    after = []
    for world in (1, 2):
        with Children(tmp_path, tmp_path / "step.py", defence, count, "--num_noise_vec", 2, world=world) as children:
            assert children.exit_codes() == [0] * world
        after.append(torch.load(tmp_path / "after.pt"))
    assert all(torch.allclose(one, two, rtol=0, atol=1e-6) for one, two in zip(*after, strict=True))
