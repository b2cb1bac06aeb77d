"""What torchrun's processes do together is what one process does alone."""

import pytest
import torch
from children import CODES, Children

HEADER = f"""
import sys
sys.path.insert(0, {str(CODES.parent / "tests")!r})

import torch
from objectives import objective_of

from spacte.data.sources import open_split
from spacte.distributed import all_gather_object, get_rank, get_world_size, init_distributed
from spacte.model import build_classifier
from spacte.train.teaching import taught_cross_entropy
from spacte.train.trainer import Trainer

init_distributed()
digits = open_split("digits", "", True)
"""
TRAINER = """
objective = objective_of(defence, "--dataset", "digits", "--arch", "R8", "--num_heads", 3, "--eps", 0.3, *flags)
trainer = Trainer(objective.recipe, objective, build_classifier("R8", "digits", 3), torch.device("cpu"), digits, digits)
"""
# an optimiser step on seven images, with noise that is a function of the image, by the statistics that BatchNorm has
STEP = f"""
{HEADER}
defence, count, *flags = sys.argv[1:]
torch.manual_seed(3)
{TRAINER}
objective.draw_noises = lambda images: torch.stack([torch.sin(900 * m * images) for m in (1, 2)]) / 2
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
# what each process draws, and its part of two epochs: the images of the first, told by their sums, and how both end
EPOCHS = f"""
{HEADER}
defence, flags = "0Gaussian", ("--epochs", 2, "--batch_size", 64, "--pace_share", 0.5)
digits.keep_first_of_each_class(200)
{TRAINER}
noises = objective.draw_noises(torch.zeros(2, 1, 8, 8))
favoured = []
for _ in range(20):
    loss = taught_cross_entropy(torch.randn(3, 2, 4, 10), torch.arange(4), 1.0, 0.3, explore=1.0)
    favoured.append(int(loss.head_weights.argmax()))
seen, step = [], trainer.step


def noting(images, *more):
    seen.extend(images.flatten(1).double().sum(1).tolist())
    return step(images, *more)


trainer.step = noting
rows = [str(row | {{"left": "", "images_per_second": 0}}) for row in trainer.epochs()]
end = [objective.class_thresholds, *(one.clone() for one in trainer.classifier.buffers())]
mine = {{"noises": noises, "favoured": favoured, "seen": seen[: len(seen) // 2], "rows": rows, "end": end}}
both = all_gather_object(mine)
if get_rank() == 0:
    torch.save([*both, digits.evenly_spaced(200)[0].flatten(1).double().sum(1).tolist()], "epochs.pt")
"""


@pytest.mark.parametrize(("defence", "count"), [("0Gaussian", 8), ("0Gaussian", 7), ("1Consistency", 7), ("4MACER", 7)])
def test_a_step_of_two_processes_is_that_of_one(tmp_path, defence, count):
    """Also where one has an image more: 4 and 3 of 7."""
    (tmp_path / "step.py").write_text(STEP)
    after = []
    for world in (1, 2):
        with Children(tmp_path, tmp_path / "step.py", defence, count, "--num_noise_vec", 2, world=world) as children:
            assert children.exit_codes() == [0] * world
        after.append(torch.load(tmp_path / "after.pt"))
    assert all(torch.allclose(one, two, rtol=0, atol=1e-6) for one, two in zip(*after, strict=True))


def test_two_processes_share_an_epoch_and_end_it_alike(tmp_path):
    """Each draws noise of its own; all favour the same head, measure the same pace and note the same figures."""
    (tmp_path / "epochs.py").write_text(EPOCHS)
    with Children(tmp_path, tmp_path / "epochs.py", world=2) as children:
        assert children.exit_codes() == [0, 0]
    one, other, images = torch.load(tmp_path / "epochs.pt")
    assert not torch.equal(one["noises"], other["noises"])
    assert one["favoured"] == other["favoured"] and len(set(one["favoured"])) == 3
    assert sorted(one["seen"] + other["seen"]) == pytest.approx(sorted(images)), "each image once in an epoch"
    assert one["rows"] == other["rows"] and len(one["rows"]) == 2
    assert all(torch.equal(*pair) for pair in zip(one["end"], other["end"], strict=True))
