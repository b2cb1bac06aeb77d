"""The further defences' losses, attacks and sampling rules: the authors' numbers, and what holds with heads."""

import sys

import numpy as np
import pytest
import torch
from conftest import AffineHeads, golden, load_module

from spacte.model.noisy import noisy_logits
from spacte.utils import UserError

GOLDEN = golden("defences")
sys.modules["catrs"] = catrs_attack = load_module("5CATRS", "catrs")
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
    with pytest.raises(UserError, match="--num_noise_dataset_weight 10 is too few to weigh images"):
        sampling.weights(np.array(few["counts"]), 10)  # the authors' weights are negative
    for case in GOLDEN["acrweak_drop_cases"]:
        stay = sampling.kept(np.array(case["counts"]), case["num_noise_vec"], case["threshold"])
        assert stay.astype(int).tolist() == case["keep"]
