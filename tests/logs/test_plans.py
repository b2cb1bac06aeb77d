"""What a run of each kind draws for an image, and what it makes of the votes, of one head of several, too."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from spacte.logs.config import RunConfig
from spacte.logs.counts import AttackCounts, VoteCounts
from spacte.logs.plans import AttackPlan, CertifyPlan, PredictPlan, accuracies, stopping_rule, table_stopping
from spacte.logs.voting import Stopping
from spacte.smooth.draws import Draws
from spacte.utils import UserError

HEAD_0_ALONE = {"num_heads": (2,), "head": 0, "alpha": 0.001, "noise_sd": 0.25, "N0": 10, "N": 100}


def test_a_head_that_is_certified_alone_ends_its_own_draws():
    assert CertifyPlan(RunConfig(**HEAD_0_ALONE)).draws(1).voter == 0


def test_a_head_that_predicts_alone_is_asked_itself():
    votes = np.array([[100, 0], [0, 100], [0, 100]])  # of head 0, head 1 and both
    row = PredictPlan(RunConfig(**HEAD_0_ALONE, kind="predict")).rows(VoteCounts(0, 0, 1.0, 0 * votes, votes))
    assert row.startswith("0\t0\t0\t1\t")


@pytest.mark.parametrize(("slack", "adversarial"), [(0.0, 0), (0.0009, -1)])
def test_an_attack_on_a_head_asks_that_head_at_the_alpha_that_the_noise_leaves(slack, adversarial):
    """68 of 100 votes: the binomial test's p is .0004."""
    votes = np.array([[68, 32], [0, 100], [0, 100]])
    plan = AttackPlan(RunConfig(**HEAD_0_ALONE, kind="attack", radii=(0.2,), noise_slack=slack))
    row = plan.rows(AttackCounts(0, 0, 0, 0.5, [0.1], [votes], [1.0])).split("\t")
    assert int(row[plan.columns.index("adversarial")]) == adversarial


def test_an_attack_at_the_certified_radius_is_within_it():
    row = {"predict": 1, "label": 1, "radius": 0.5, "attack_radius": 0.5, "correct": 1, "broken": 0}
    assert accuracies(pd.DataFrame([row]))["certified accuracy"].tolist() == [1]


def test_a_wrong_class_is_estimated_unless_it_is_skipped_and_a_prediction_selects_none():
    config = RunConfig(**HEAD_0_ALONE)
    assert CertifyPlan(config).draws(1) == Draws(10, 100, 0)
    assert CertifyPlan(replace(config, skip_wrong=True)).draws(1) == Draws(10, 100, 0, only_class=1)
    assert PredictPlan(replace(config, kind="predict")).draws(1) == Draws(0, 100)


ALONE = {"num_heads": (1,), "alpha": 0.001, "noise_sd": 0.25, "N0": 10, "N": 100}
FIRST, SECOND, NONE = (np.array([votes]) for votes in ([100, 0], [0, 100], [50, 50]))  # which class is predicted


def attacked(votes, predict=0, norm=0.4):
    """The row of an attack on a certificate of radius 0.5 for an image of label 0, by the names of its columns."""
    plan = AttackPlan(RunConfig(**ALONE, kind="attack", radii=(0.6,)))
    row = plan.rows(AttackCounts(0, 0, predict, 0.5, [norm], [votes], [1.0]))
    return dict(zip(plan.columns, row.split("\t"), strict=True))


@pytest.mark.parametrize(
    ("votes", "norm", "broken"),
    [(SECOND, 0.4, "1"), (SECOND, 0.5, "0"), (SECOND, 0.55, "0"), (NONE, 0.4, "0"), (FIRST, 0.4, "0")],
)
def test_a_certificate_is_broken_by_another_class_inside_its_radius(votes, norm, broken):
    """However far the attack might have gone (0.6). An abstention is no other class."""
    assert attacked(votes, norm=norm)["broken"] == broken


@pytest.mark.parametrize(("predict", "right"), [(0, "1"), (-1, "1"), (1, "0")])
def test_an_image_is_right_under_attack_unless_another_class_was_certified(predict, right):
    assert attacked(FIRST, predict)["correct"] == right and attacked(SECOND, predict)["correct"] == "0"


def test_an_attacks_score_is_that_of_its_largest_radius():
    plan = AttackPlan(RunConfig(**ALONE, kind="attack", radii=(0.2, 0.6)))
    scores = [plan.score(AttackCounts(0, 0, 0, 0.5, [0.2, 0.6], votes, [1.0] * 2)) for votes in
              ([FIRST, SECOND], [FIRST, FIRST])]  # fmt: skip
    assert scores == [0, 1]


def test_only_right_images_add_to_the_acr():
    plan, selection = CertifyPlan(RunConfig(**ALONE)), FIRST // 10
    right, wrong = (plan.score(VoteCounts(0, label, 1.0, selection, FIRST)) for label in (0, 1))
    assert right == plan.largest_radius > 0 == wrong


def test_a_predictions_score_is_whether_it_is_right():
    plan = PredictPlan(RunConfig(**ALONE, kind="predict"))
    assert [plan.score(VoteCounts(0, 0, 1.0, 0 * votes, votes)) for votes in (FIRST, SECOND, NONE)] == [1, 0, 0]


def test_a_certificate_of_a_wrong_class_is_no_certified_image():
    row = {"predict": 2, "label": 1, "radius": 0.5, "attack_radius": 0.2, "correct": 0, "broken": 0}
    assert accuracies(pd.DataFrame([row]))["certified accuracy"].tolist() == [0]


def test_votes_of_another_number_of_draws_are_no_counts_of_the_run():
    few = np.array([[98, 1]])
    attack = AttackCounts(0, 0, 0, 0.5, [0.1, 0.2], [FIRST, few], [1.0] * 2)
    for kind, plan, counts in (
        ("predict", PredictPlan, VoteCounts(0, 0, 1.0, 0 * few, few)),
        ("attack", AttackPlan, attack),
        ("certify", CertifyPlan, VoteCounts(0, 0, 1.0, FIRST // 10, few)),
    ):
        with pytest.raises(UserError, match="not a vote count of this run: "):
            plan(RunConfig(**ALONE, kind=kind, radii=(0.1, 0.2))).from_line(counts.to_line())


@pytest.mark.parametrize(("plan", "kind"), [(PredictPlan, "predict"), (AttackPlan, "attack")])
def test_the_fewest_draws_that_decide_are_enough(plan, kind):
    """11 unanimous votes: the binomial test's p is 2^-10, just below alpha."""
    plan(RunConfig(**ALONE | {"N": 11}, kind=kind, radii=(0.1,)))
    with pytest.raises(UserError, match=r"--N 10 at --alpha 0.001 always abstains.* take at least 11"):
        plan(RunConfig(**ALONE | {"N": 10}, kind=kind, radii=(0.1,)))


def test_the_default_rule_asks_about_the_radii_that_sequential_draws_can_reach():
    """100 unanimous votes certify 0.750 at sigma 0.5, but 0.711 where a rule has looked at them meanwhile."""
    config = RunConfig(**ALONE | {"noise_sd": 0.5})
    assert CertifyPlan(config).largest_radius > 0.75
    assert table_stopping(config) == Stopping((0.0, 0.25, 0.5), 0.01)


def test_a_rule_is_asked_about_the_configurations_certificates():
    """At the alpha that the noise leaves; with the give_up or the tolerance that was asked for."""
    config = RunConfig(**ALONE, noise_slack=0.0009)
    radii, tolerance = Stopping((0.25,), 0.3), Stopping(tolerance=0.05)
    asked = [stopping_rule(replace(config, sequential=one)) for one in (radii, tolerance)]
    assert [rule.alpha for rule in asked] == pytest.approx([0.0001] * 2)
    assert asked[0].give_up == 0.3 and asked[1].tolerance == 0.05
    all_votes = [stopping_rule(replace(config, sequential=one, certificate="all-votes")) for one in (radii, tolerance)]
    assert [rule.certificate.alpha for rule in all_votes] == pytest.approx([0.0001] * 2)
    assert [(rule.give_up, rule.tolerance) for rule in all_votes] == [(0.3, None), (0.01, 0.05)]
