import pytest
import torch
import torch.nn.functional as F
from conftest import AffineHeads, golden, load_module

from spacte.model.ascent import pgd

GOLDEN = golden("losses")
gaussian, consistency, smoothmix = (
    load_module(defence, "circular_teaching") for defence in ("0Gaussian", "1Consistency", "2SmoothMix")
)
attack = load_module("2SmoothMix", "smoothmix").attack
RTOL, GRADIENT_RTOL = 1e-5, 1e-4


def close(ours, theirs, rtol=RTOL):
    theirs = torch.as_tensor(theirs)
    return torch.testing.assert_close(ours.detach(), theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def name(case):
    return f"{case.get('kind', 'smoothmix')}-L{case['num_heads']}-m{case['num_noise_vec']}-eps{case['eps']}"


@pytest.mark.parametrize("case", GOLDEN["loss_cases"], ids=name)
def test_values_and_gradients_are_the_authors(case):
    logits = torch.tensor(case["logits"], requires_grad=True)
    arguments = (logits, torch.tensor(case["labels"]), case["threshold"], case["eps"])
    if case["kind"] == "gaussian":
        loss = gaussian.ct_loss(*arguments, explore=0)
    else:
        loss = consistency.ct_loss(*arguments, case["lbd"], case["eta"], explore=0)
        close(loss.consistency, case["consistency"])
    close(loss.ce, case["loss_ce"])
    close(loss.heads, case["head_losses"])
    close(loss.total, case["total"])
    loss.total.backward()
    close(logits.grad, case["grad_total"], GRADIENT_RTOL)


@pytest.mark.parametrize("case", GOLDEN["smoothmix_cases"], ids=name)
def test_attack_and_mixed_loss_are_the_authors(case):
    classifier = AffineHeads(case)
    x, noises, labels = (torch.tensor(case[key]) for key in ("x", "noises", "labels"))
    maxnorm_s = case["attack_alpha"] * case["mix_step"] if case["maxnorm_s"] is None else case["maxnorm_s"]
    steps = (case["num_steps"], case["mix_step"], case["attack_alpha"])
    clean, adversary = attack(classifier, x, labels, noises, *steps, maxnorm_s, case["maxnorm"])
    close(clean, case["clean"], GRADIENT_RTOL)
    close(adversary, case["adversary"], GRADIENT_RTOL)
    assert classifier.weights.grad is None

    loss = smoothmix.ct_loss(
        classifier, torch.tensor(case["clean"]), torch.tensor(case["adversary"]), noises, labels,
        case["threshold"], case["eps"], torch.tensor(case["uniform"]), explore=0,
    )  # fmt: skip
    close(loss.ce, case["loss_ce"])
    close(loss.heads, case["head_losses"])
    close(loss.mix, case["loss_mix"])
    assert loss.total is loss.ce
    (loss.ce + case["eta"] * loss.mix).backward()
    close(classifier.weights.grad, case["grad_weights_of_ce_plus_eta_mix"], GRADIENT_RTOL)


def test_one_head_is_gaussian_training():
    logits, labels = torch.randn(1, 3, 6, 10), torch.arange(6)
    plain = F.cross_entropy(logits[0].flatten(0, 1), labels.repeat(3))
    torch.testing.assert_close(gaussian.ct_loss(logits, labels, 0.1, 0.8).total, plain)


def test_one_head_is_the_consistency_defence():
    """Jeong and Shin's loss, written out with its gradient through the mean prediction."""
    labels = torch.arange(6)
    logits = torch.randn(1, 2, 6, 10, requires_grad=True)
    copies = [logits[0, j].softmax(1) for j in range(2)]
    mean = (copies[0] + copies[1]) / 2
    kl = sum((mean * (mean.log() - copy.log())).sum(1).mean() for copy in copies) / 2
    entropy = -(mean * mean.log()).sum(1).mean()
    plain = F.cross_entropy(logits[0].flatten(0, 1), labels.repeat(2)) + 10 * kl + 0.5 * entropy
    loss = consistency.ct_loss(logits, labels, 0.1, 0.8, lbd=10, eta=0.5).total
    torch.testing.assert_close(loss, plain)
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 3])
def test_mean_grad_chooses_the_gradient_and_not_the_value(heads):
    logits, labels = torch.randn(heads, 2, 6, 10, requires_grad=True), torch.arange(6)
    losses = {
        flag: consistency.ct_loss(logits, labels, 1.0, 0.8, 10, 0.5, flag, 0).total for flag in (None, True, False)
    }
    grads = {flag: torch.autograd.grad(loss, logits)[0] for flag, loss in losses.items()}
    assert losses[True] == losses[False]
    assert not torch.allclose(grads[True], grads[False])
    assert torch.equal(grads[None], grads[heads == 1])


def test_turning_the_ring_leaves_the_loss():
    logits, labels = torch.randn(5, 2, 8, 10), torch.arange(8)
    before, after = (gaussian.ct_loss(z, labels, 1.0, 0.6, explore=0) for z in (logits, logits.roll(3, 0)))
    torch.testing.assert_close(before.total, after.total)
    torch.testing.assert_close(before.heads.roll(3), after.heads)


@pytest.mark.parametrize(("maxnorm_s", "maxnorm"), [(0.3, 0.8), (0.0, 0.2)])
def test_the_attack_stays_in_its_balls_and_climbs(maxnorm_s, maxnorm):
    classifier = AffineHeads(GOLDEN["smoothmix_cases"][1]).train()
    images, labels = torch.rand(16, 1, 4, 4), torch.randint(10, (16,))
    noises = torch.randn(2, 16, 1, 4, 4) * 0.1
    clean, adversary = attack(classifier, images, labels, noises, 6, 2, 0.3, maxnorm_s, maxnorm)
    for moved, radius in ((clean, maxnorm_s), (adversary, maxnorm)):
        assert float((moved - images).flatten(1).norm(dim=1).max()) <= radius + 1e-5
        assert float(moved.min()) >= 0 and float(moved.max()) <= 1

    def loss(x):
        probabilities = classifier((x + noises).flatten(0, 1)).unflatten(1, (2, 16)).softmax(-1).mean(1)
        return -probabilities[:, range(16), labels].log().mean(0)

    assert bool((loss(adversary) >= loss(images) - 1e-4).all())
    assert classifier.training


def test_an_attack_climbs_the_network_in_eval_mode():
    """In training mode it would count the attacked images among BatchNorm's statistics."""
    modes = []

    class Noted(torch.nn.Linear):
        def forward(self, images):
            modes.append(self.training)
            return super().forward(images.flatten(1)).unsqueeze(0)

    noises = torch.randn(2, 2, 1, 2, 2)
    list(pgd(Noted(4, 3).train(), torch.rand(2, 1, 2, 2), torch.arange(2), lambda: noises, 2, 0.1))
    assert modes == [False, False]


@pytest.mark.parametrize("training", [True, False])
def test_an_attack_leaves_a_module_in_its_mode(training):
    layers = torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.Unflatten(0, (1, -1))
    network = torch.nn.Sequential(*layers).train(training)
    noises = torch.randn(2, 2, 1, 2, 2)
    list(pgd(network, torch.rand(2, 1, 2, 2), torch.arange(2), lambda: noises, 2, 0.1))
    assert network.training == training and network[1].training == training


def mixed():
    torch.manual_seed(1)
    heads = AffineHeads({"weights": torch.randn(3, 5, 16).tolist(), "biases": torch.zeros(3, 5).tolist()})
    return heads, torch.rand(6, 1, 4, 4), torch.rand(6, 1, 4, 4), 0.5 * torch.randn(2, 6, 1, 4, 4), torch.arange(6) % 5


def test_each_image_is_mixed_by_a_draw_of_its_own():
    """Uniform in (0, 1) where it is not given."""
    case = mixed()
    torch.manual_seed(0)
    drawn = smoothmix.ct_loss(*case, 1.0, 0.8, explore=0)
    torch.manual_seed(0)
    torch.randint(3, ()), torch.rand(())  # which head is favoured is drawn first
    given = smoothmix.ct_loss(*case, 1.0, 0.8, torch.rand(6), explore=0)
    assert drawn.mix == given.mix


def test_a_target_that_underflows_leaves_the_gradient_finite():
    heads, clean, adversary, noises, labels = mixed()
    with torch.no_grad():
        heads.weights.mul_(1000)
    loss = smoothmix.ct_loss(heads, clean, adversary, noises, labels, 1.0, 0.8, torch.zeros(6), explore=0)
    (loss.ce + loss.mix).backward()
    assert heads.weights.grad.isfinite().all()
