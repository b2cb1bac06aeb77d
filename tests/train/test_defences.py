"""The further defences' losses, attacks and sampling rules: the authors' numbers, and what holds with heads."""

import numpy as np
import pytest
import torch
from conftest import AffineHeads, golden, load_module

from spacte.model.noisy import noisy_logits
from spacte.utils import UserError

GOLDEN = golden("defences")
catrs_attack = load_module("5CATRS", "catrs")
NAMES = ("3SmoothAdv", "4MACER", "5CATRS", "6ACRWeakness", "7Stability")
smoothadv, macer, catrs, acrweakness, stability = (load_module(defence, "circular_teaching") for defence in NAMES)
pgd_attack = load_module("3SmoothAdv", "smoothadv").attack
sphere_attack, sampling = (load_module("6ACRWeakness", name) for name in ("attack", "sampling"))
NO_TEACHING = {"threshold": 1.0, "eps": 0.8, "explore": 0}


def close(ours, theirs, rtol=1e-5):
    torch.testing.assert_close(torch.as_tensor(ours).detach(), torch.tensor(theirs), rtol=rtol, atol=1e-6)


def case_of(kind):
    return pytest.mark.parametrize("case", GOLDEN[f"{kind}_cases"], ids=lambda case: case["note"])


def tensors(case, *names):
    return [torch.tensor(case[name]) for name in names]


@case_of("smoothadv")
def test_smoothadvs_attack_and_loss_are_the_authors(case):
    classifier = AffineHeads(case)
    x, noises, labels = tensors(case, "x", "noises", "labels")
    adversary = pgd_attack(classifier, x, labels, noises, case["num_steps"], case["max_norm"])
    close(adversary, case["adversarial_x"], 1e-4)
    logits = noisy_logits(classifier, torch.tensor(case["adversarial_x"]), noises)
    loss = smoothadv.ct_loss(logits, labels, **NO_TEACHING).total
    close(loss, case["loss"])
    loss.backward()
    close(classifier.weights.grad, case["grad_weights"], 1e-4)


@case_of("macer")
def test_macers_loss_is_the_authors(case):
    logits, labels = torch.tensor(case["logits"]).unsqueeze(0).requires_grad_(), torch.tensor(case["labels"])
    settings = (case["noise_sd"], case["lbd"], case["beta"], case["gamma"])
    loss = macer.ct_loss(logits, labels, 1.0, 0.8, *settings, explore=0)
    close(loss.cl * len(labels), case["cl"])
    if case["lbd"]:
        close(loss.rl * len(labels), case["rl"])
    close(loss.total, case["loss"])
    loss.total.backward()
    close(logits.grad[0], case["grad_logits"], 1e-4)


@case_of("stability")
def test_stabilitys_loss_is_the_authors(case):
    clean, noisy = (torch.tensor(case[name]).unsqueeze(0).requires_grad_() for name in ("clean_logits", "noisy_logits"))
    labels = torch.tensor(case["labels"])
    loss = stability.ct_loss(clean, noisy.unsqueeze(1), labels, lbd=case["lbd"], **NO_TEACHING)
    close(loss.ce, case["loss_ce"])
    close(loss.stability, case["stability"])
    close(loss.total, case["loss"])
    loss.total.backward()
    close(clean.grad[0], case["grad_clean_logits"], 1e-4)
    close(noisy.grad[0], case["grad_noisy_logits"], 1e-4)


@case_of("catrs")
def test_catrs_attack_and_loss_are_the_authors(case):
    classifier = AffineHeads(case)
    x, noises, labels, votes, drawn = tensors(case, "x", "noises", "labels", "soft_votes", "drawn")
    logits = noisy_logits(classifier, x, noises)
    adversary = catrs_attack.attack(classifier, x, noises, votes, case["num_steps"], case["max_norm"])
    close(adversary, case["adversarial_noises"], 1e-4)
    hard = noisy_logits(classifier, x, torch.tensor(case["adversarial_noises"]))
    close(catrs_attack.divergences(hard, votes)[0].amax(0), case["loss_high"])
    settings = (case["lbd"], case["confidence_mask"])
    loss = catrs.ct_loss(logits, hard, labels, votes, 1.0, 0.8, *settings, drawn.float().unsqueeze(0), explore=0)
    close(loss.low, np.mean(case["loss_low"]).tolist())
    close(loss.mask, np.mean(case["mask"]).tolist())
    close(loss.total, case["loss"])
    loss.total.backward()
    close(classifier.weights.grad, case["grad_weights"], 1e-4)


@case_of("acrweak_attack")
def test_acrweakness_attack_and_loss_are_the_authors(case):
    classifier = AffineHeads(case)
    x, noises, labels = tensors(case, "x", "noises", "labels")
    adversary = sphere_attack.attack(classifier, x, labels, noises, case["num_steps"], case["step_size"])
    close(adversary, case["adversarial_noises"], 1e-4)
    moved = (adversary != noises).flatten(2).any(-1)
    assert torch.equal(moved, torch.tensor(case["kept_step"]) > 0)
    logits = noisy_logits(classifier, x, torch.tensor(case["adversarial_noises"]))
    loss = acrweakness.ct_loss(logits, labels, **NO_TEACHING).total
    close(loss, case["loss"])
    loss.backward()
    close(classifier.weights.grad, case["grad_weights"], 1e-4)


def test_acrweakness_weights_and_dropped_images_are_the_authors():
    published, few = GOLDEN["acrweak_weight_cases"]
    np.testing.assert_allclose(sampling.weights(np.array(published["counts"]), 16), published["weight"], rtol=1e-5)
    with pytest.raises(UserError, match="--num_noise_dataset_weight 10 is too few to weight images"):
        sampling.weights(np.array(few["counts"]), 10)  # the authors' weights are negative
    for case in GOLDEN["acrweak_drop_cases"]:
        stay = sampling.kept(np.array(case["counts"]), case["num_noise_vec"], case["threshold"])
        assert stay.astype(int).tolist() == case["keep"]


# --- with heads ---

HEADS, COPIES, BATCH, CLASSES = 3, 4, 6, 5


def losses_of(defence, part=slice(None), heads=slice(None), threshold=1.0):
    """The defence's loss on fixed logits, those of some samples and heads alone."""
    generator = torch.Generator().manual_seed(3)
    logits, other = 2 * torch.randn(2, HEADS, COPIES, BATCH, CLASSES, generator=generator)
    votes = torch.randn(BATCH, CLASSES, generator=generator).softmax(1)[part]
    drawn = torch.randint(COPIES + 1, (HEADS, BATCH), generator=generator)[heads, part]
    logits, other = logits[heads, :, part], other[heads, :, part]
    labels, pace = (torch.arange(BATCH) % CLASSES)[part], (threshold, 0.6)
    if defence == "3SmoothAdv":
        return smoothadv.ct_loss(logits, labels, *pace, explore=0)
    if defence == "4MACER":
        return macer.ct_loss(logits, labels, *pace, 0.5, 12.0, 2.0, 8.0, explore=0)
    if defence == "5CATRS":
        return catrs.ct_loss(logits, other, labels, votes, *pace, 0.5, drawn=drawn, explore=0)
    if defence == "6ACRWeakness":
        return acrweakness.ct_loss(logits, labels, *pace, explore=0)
    return stability.ct_loss(logits[:, 0], other, labels, *pace, 2.0, explore=0)


@pytest.mark.parametrize("defence", NAMES)
def test_the_loss_is_the_base_methods_of_each_head_and_sample_weighted_in_the_ring(defence):
    """sum_h c_h mean_i w[h-1,i] base[h,i], where w comes from the cross-entropy of all heads."""
    base = torch.tensor(
        [[losses_of(defence, slice(i, i + 1), slice(h, h + 1)).total for i in range(BATCH)] for h in range(HEADS)]
    )
    loss = losses_of(defence)
    assert bool((loss.sample_weights < 1).any()) and bool((base > 0).all())
    torch.testing.assert_close(loss.total, loss.head_weights @ (loss.sample_weights * base).mean(1))


@pytest.mark.parametrize("defence", NAMES)
def test_turning_the_ring_leaves_the_loss(defence):
    before, after = losses_of(defence), losses_of(defence, heads=[2, 0, 1])
    torch.testing.assert_close(before.total, after.total)
    torch.testing.assert_close(before.heads[[2, 0, 1]], after.heads)


def test_macers_radius_loss_is_the_hinge_on_the_soft_radius_and_its_gradient_is_finite():
    """Two classes, both logits known: a right, a wrong and a far image, whose Phi^-1 is infinite."""
    logits = torch.tensor([[[[0.4, 0.0], [0.0, 0.4], [500.0, 0.0]]]], requires_grad=True)  # [1, 1, 3, 2]
    losses = macer.radius_losses(logits, torch.zeros(3, dtype=torch.int64), 0.5, 2.0, 8.0)
    a = torch.tensor(0.8, dtype=torch.float64).sigmoid()
    xi = 2 * torch.special.ndtri(a)
    torch.testing.assert_close(losses.detach(), torch.tensor([[0.25 * (8 - xi), 0, 0]], dtype=torch.float32))
    losses.sum().backward()
    assert bool(logits.grad.isfinite().all()) and bool((logits.grad[0, 0, 1:] == 0).all())


def test_catrs_draws_from_its_binomial():
    """A head that gets 3 of 4 copies right: mean of the mask .75^4, over 5,000 draws within 6 sd (P < 1e-8)."""
    logits = torch.zeros(1, 4, 5000, 2)
    logits[:, :3, :, 0], logits[:, 3, :, 1] = 1, 1
    votes, labels = torch.full((5000, 2), 0.5), torch.zeros(5000, dtype=torch.int64)
    share = float(catrs.ct_loss(logits, logits, labels, votes, 1.0, 0.8, 1.0).mask)
    assert abs(share - 0.75**4) < 6 * (0.75**4 * (1 - 0.75**4) / 5000) ** 0.5
    sure = torch.tensor([[1.0, 0.0]]).expand(5000, 2)
    assert float(catrs.ct_loss(logits, logits, labels, sure, 1.0, 0.8, 1.0, confidence_mask=True).mask) == 1


class Heads(AffineHeads):
    """Affine heads on tanh(pixels), drawn."""

    def __init__(self):
        super().__init__({"weights": torch.randn(3, 5, 16).tolist(), "biases": torch.zeros(3, 5).tolist()})


@pytest.fixture
def attacked():
    """A classifier of three heads in training, images, labels and noises."""
    return Heads().train(), torch.rand(16, 1, 4, 4), torch.randint(5, (16,)), 0.5 * torch.randn(4, 16, 1, 4, 4)


def test_smoothadvs_adversary_stays_in_its_ball_and_climbs(attacked):
    classifier, images, labels, noises = attacked
    adversary = pgd_attack(classifier, images, labels, noises, 6, 0.4)
    assert float((adversary - images).flatten(1).norm(dim=1).max()) <= 0.4 + 1e-5
    assert float(adversary.min()) >= 0 and float(adversary.max()) <= 1
    before, after = (
        noisy_logits(classifier, x, noises).softmax(-1).mean(1)[:, range(16), labels].log() for x in (images, adversary)
    )
    assert bool((after.mean(0) <= before.mean(0) + 1e-4).all())
    assert classifier.training and classifier.weights.requires_grad and classifier.weights.grad is None


def test_acrweakness_noises_keep_their_norms_until_the_ensemble_is_wrong(attacked):
    classifier, images, labels, noises = attacked
    moved = sphere_attack.attack(classifier, images, labels, noises, 5, 0.3)
    torch.testing.assert_close(moved.flatten(2).norm(dim=2), noises.flatten(2).norm(dim=2))

    def wrong(points):
        return noisy_logits(classifier, images, points).sum(0).argmax(-1) != labels  # [m, B]

    drawn_wrong, changed = wrong(noises), (moved != noises).flatten(2).any(-1)
    assert torch.equal(changed, ~drawn_wrong) and bool(changed.any()) and bool(drawn_wrong.any())
    assert int(wrong(moved).sum()) > int(drawn_wrong.sum())
    assert torch.equal(sphere_attack.attack(classifier, images, labels, noises, 0, 0.3), noises)
    assert classifier.training and classifier.weights.requires_grad


def test_catrs_noises_leave_the_votes_and_keep_their_means(attacked):
    classifier, images, _, noises = attacked
    votes = torch.randn(16, 5).softmax(1)
    moved = catrs_attack.attack(classifier, images, noises, votes, 4, 0.5)
    torch.testing.assert_close(moved.mean((2, 3, 4)), noises.mean((2, 3, 4)), rtol=0, atol=1e-5)
    before, after = (
        catrs_attack.divergences(noisy_logits(classifier, images, x), votes).mean().detach() for x in (noises, moved)
    )
    assert after > before and classifier.training and classifier.weights.requires_grad


def test_stability_is_the_mean_of_the_copies_cross_entropies():
    torch.manual_seed(0)
    clean, noisy, labels = torch.randn(2, 6, 5), torch.randn(2, 3, 6, 5), torch.arange(6) % 5
    stability = load_module("7Stability", "circular_teaching")
    loss = stability.ct_loss(clean, noisy, labels, 1.0, 0.6, 2.0, explore=0)
    each = torch.stack([-(clean.softmax(-1) * noisy[:, j].log_softmax(-1)).sum(-1) for j in range(3)])  # [m, L, B]
    torch.testing.assert_close(loss.stability, loss.head_weights @ (loss.sample_weights * each.mean(0)).mean(1))


def test_a_share_that_is_the_threshold_stays():
    """.07 of 100 is 7.000000000000001 in floating point."""
    kept = load_module("6ACRWeakness", "sampling").kept
    assert kept(np.array([6, 7, 8]), 100, 0.07).tolist() == [False, True, True]
