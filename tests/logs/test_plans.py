"""What a run of each kind draws for an image, and what it makes of the votes, of one head of several, too."""

import numpy as np
import pandas as pd
import pytest

from spacte.logs.config import RunConfig
from spacte.logs.counts import AttackCounts, VoteCounts
from spacte.logs.plans import AttackPlan, CertifyPlan, PredictPlan, accuracies

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
