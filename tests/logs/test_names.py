"""What a log's name says of its run."""

import pytest

from spacte.logs.runfiles import run_name


@pytest.mark.parametrize("voter", ["", "-head-2"])
@pytest.mark.parametrize(
    "certified",
    [
        "{voter}-certify-skip-20",
        "{voter}-certify-skip-20-sequential",
        "{voter}-certify-skip-20-sequential-all-votes-top-3",
        "-certify-skip-20-alpha-1e-05-cohen{voter}",
        "-certify-skip-20-sequential-alpha-0.001{voter}",
    ],
)
def test_one_run_has_one_name_however_it_was_certified(voter, certified):
    """Also where relog.py has certified it again, for a head, say."""
    run = "h-5-eps-0.8-m-2-lbdlast-1.2"
    assert run_name(run + certified.format(voter=voter), configured=True) == run + voter
