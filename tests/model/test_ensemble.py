"""How members are combined: the sum of logits, and the consensus of a few of them."""

import itertools

import pytest
import torch
from test_frozen import CPU, warmed_up

from spacte.model import passes as passes_module
from spacte.model.ensemble import classes_of_all, with_ensemble
from spacte.model.frozen import freeze
from spacte.model.members import NetworkEnsemble
from spacte.smooth.draws import Draws
from spacte.smooth.smooth import Smooth
from spacte.smooth.tally import VoteRequest
from spacte.smooth.voters import Consensus


def by_definition(logits, first):
    """The class of f_K for each image, of logits [L, N, K], one image at a time."""
    classes = []
    for image in range(logits.shape[1]):
        named = {int(one[image].argmax()) for one in logits[:first]}
        classes.append(named.pop() if len(named) == 1 else int(sum(one[image] for one in logits).argmax()))
    return classes


@pytest.mark.parametrize("first", [2, 3, 4])
def test_the_consensus_is_the_class_on_which_the_first_agree_or_else_the_sums(first):
    """Integer logits of three classes make agreement, ties and sums that overrule it frequent."""
    logits = torch.randint(0, 4, (5, 2000, 3)).float()
    rows = Consensus(lambda images: logits, 3, first)(torch.zeros(2000, 1, 2, 2))
    assert rows.shape == (first + 1, 2000) and torch.equal(rows[:first], logits[:first].argmax(-1))
    expected = by_definition(logits, first)
    assert rows[-1].tolist() == expected != logits.sum(0).argmax(-1).tolist()


def images_of(n=70):
    return torch.rand(n, 3, 32, 32) + 0.5 * torch.randn(n, 3, 32, 32)


def test_an_images_sum_does_not_depend_on_its_company():
    """Two classes have the same logits in another order, so that rounding alone decides between their sums."""
    logits = torch.randn(5, 100, 3)
    logits[:, :, 1] = logits[torch.randperm(5), :, 0]
    alone = torch.cat([classes_of_all(logits[:, [k]], 3) for k in range(100)], 1)
    for start, end in itertools.combinations(range(0, 101, 3), 2):
        assert torch.equal(classes_of_all(logits[:, start:end].clone(), 3), alone[:, start:end])
    assert len(alone[-1].unique()) == 3


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_networks_consensus_is_that_of_all_its_logits(monkeypatch, precision):
    """Whatever the batch, although the other heads see only what the first two disagree on."""
    monkeypatch.setattr(passes_module, "CPU_PIXELS", 8 * 32 * 32)
    classifier = warmed_up("R20", "CIFAR10", (3, 32, 32), heads=4)
    like, other = classifier[1].heads[:2]
    like[1].bias.data -= classifier(images_of())[0].mean(0)  # every class is named
    other.load_state_dict(like.state_dict())
    other[1].bias.data += 0.02 * torch.randn(10)  # as trained heads do, the two mostly agree
    frozen = freeze(classifier, CPU, precision, batch_size=50)
    images, late, consensus = images_of(), [], Consensus(frozen, 10, 2)
    logits = frozen(images)
    frozen.network.heads[3][0].register_forward_pre_hook(lambda module, inputs: late.append(len(inputs[0])))
    rows = consensus(images)
    assert torch.equal(rows[:2], logits[:2].argmax(-1)) and rows[-1].tolist() == by_definition(logits, 2)
    disagreed = int((logits[0].argmax(-1) != logits[1].argmax(-1)).sum())
    assert 0 < disagreed < 70
    assert set(late) == {2} and len(late) == -(-disagreed // 2), "passes of a quarter"
    for part in (slice(1), slice(3, 10), slice(20, 70)):
        assert torch.equal(consensus(images[part]), rows[:, part])
    _, features = frozen.first_logits(images, 2)
    few = [frozen.other_logits(features[part], 2) for part in (slice(70), slice(9))]
    assert torch.equal(few[0][:, :9], few[1]), "to the last bit, whichever images are beside it"
    torch.testing.assert_close(few[0], logits[2:])


@torch.inference_mode()
def test_networks_agree_by_the_sums_of_their_own_heads():
    networks = [freeze(warmed_up("R8", "CIFAR10", (3, 32, 32), heads), CPU) for heads in (2, 1, 3)]
    images = images_of()
    sums = torch.stack([network(images).sum(0) for network in networks])
    rows = Consensus(NetworkEnsemble(networks), 10, 2)(images)
    assert torch.equal(rows[:2], sums[:2].argmax(-1)) and rows[-1].tolist() == by_definition(sums, 2)
    calls = []
    networks[2].network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    same = Consensus(NetworkEnsemble([networks[0], networks[0], networks[2]]), 10, 2)
    assert torch.equal(same(images)[-1], networks[0](images).sum(0).argmax(-1)) and not calls


def test_the_other_heads_see_little_more_than_the_undecided_copies():
    """Of three images that share batches: the votes are those of each image alone."""
    frozen = freeze(warmed_up("R8", "CIFAR10", (3, 32, 32), heads=4), CPU, batch_size=50)
    frozen.images_per_pass, late = 16, []
    frozen.network.heads[3][0].register_forward_pre_hook(lambda module, inputs: late.append(len(inputs[0])))
    images, smooth = images_of(3), Smooth(frozen, 10, 0.5, consensus=2)

    def votes(which):
        seeded = [VoteRequest(images[idx], torch.Generator().manual_seed(idx), Draws(30, 270), idx) for idx in which]
        found = smooth.count_many(seeded, 50)
        return {one.idx: [one.selection.tolist(), one.estimation.tolist(), one.disagreed] for one in found}

    found = votes(range(3))
    assert all(sum(row) == 30 for selection, *_ in found.values() for row in selection)
    assert all(sum(row) == 270 for _, estimation, _ in found.values() for row in estimation)
    disagreed, batches = sum(one[-1] for one in found.values()), 18
    assert 0 < disagreed < 900 and sum(late) <= disagreed + 3 * batches, "passes of four, in each batch one not full"
    assert found == votes([0]) | votes([1]) | votes([2])


class ThreeHeads(torch.nn.Module):
    """Two heads choose class 0 narrowly, one class 1 by far; the second one changes its mind to the right of 0."""

    def forward(self, images):
        right = (images.flatten(1).sum(1) > 0).float()
        heads = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 9.0]]).unsqueeze(1).repeat(1, len(images), 1)
        heads[1, :, 1] = 2 * right
        return heads


def test_a_consensus_of_too_many_or_too_few_is_refused():
    with pytest.raises(ValueError, match="a consensus of 0: it must be of at least 1 head"):
        Smooth(ThreeHeads(), 2, 0.5, consensus=0)
    for classifier, first in ((ThreeHeads(), 3), (lambda images: images.flatten(1)[:, :2], 1)):
        with pytest.raises(ValueError, match=r"logits \[.*\]: a consensus of . needs \[L, N, K\] with more heads"):
            Smooth(classifier, 2, 0.5, consensus=first).count_votes(torch.zeros(1, 4, 4), 10, 10)
    frozen = freeze(warmed_up("R8", "digits", (1, 8, 8), heads=3), CPU)
    with pytest.raises(ValueError, match="a consensus of 3 needs more members than 3"):
        Consensus(frozen, 10, 3)
    Consensus(frozen, 10, 2)


def test_the_other_heads_logits_name_no_class_where_they_decide_and_are_not_finite():
    """The first two disagree on the first image alone; one of the others is broken on both."""
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], [[torch.nan, 0.0], [torch.nan, 0.0]]])
    rows = Consensus(lambda images: logits, 2, 2)(torch.zeros(2, 1, 2, 2))
    assert rows.tolist() == [[0, 0], [1, 0], [2, 0]]


def test_votes_by_consensus_are_counted():
    """The sum chooses class 1 always; the two agree on 0 to the left: with Phi(1) of the noise where x is at -sigma."""
    x, sigma = torch.full((1, 1, 1), -0.5), 0.5
    plain = Smooth(ThreeHeads(), 2, sigma).count_votes(x, 4000, 500, torch.Generator().manual_seed(0))
    assert plain[-1].tolist() == [0, 4000]
    votes = Smooth(ThreeHeads(), 2, sigma, consensus=2).count_votes(x, 4000, 500, torch.Generator().manual_seed(0))
    assert votes.shape == (3, 2) and votes[0].tolist() == [4000, 0] and (votes[1] == votes[2]).all()
    assert (votes[:2] == plain[:2]).all(), "the heads alone, from the same draws"
    assert abs(votes[2][0] / 4000 - 0.8413) < 0.035  # 6 standard deviations


@pytest.mark.parametrize("more", [
    {},
    {"should_stop": lambda selection, estimation: estimation.sum() > 250},
    {"only_class": 1},
])  # fmt: skip
def test_the_copies_on_which_the_first_disagree_are_counted_for_each_image(more):
    """The two disagree where the second one chooses class 1, as its own votes tell; images share batches."""
    images = torch.linspace(-0.5, 0.5, 7).view(-1, 1, 1, 1)
    requests = (
        VoteRequest(x, torch.Generator().manual_seed(idx), Draws(40, 700, **more), idx) for idx, x in enumerate(images)
    )
    found = {one.idx: one for one in Smooth(ThreeHeads(), 2, 0.5, consensus=2).count_many(requests, 300)}
    by_votes = [int(found[idx].selection[1, 1] + found[idx].estimation[1, 1]) for idx in range(7)]
    assert [found[idx].disagreed for idx in range(7)] == by_votes
    assert by_votes == sorted(by_votes) and 0 < by_votes[0] < by_votes[-1]
    assert with_ensemble(torch.zeros(3, 5, 2)).shape == (4, 5, 2)
