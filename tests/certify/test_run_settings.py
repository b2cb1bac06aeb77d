"""Which images a run takes."""

import pytest

from spacte.certify.run_settings import RunSettings
from spacte.utils import UserError


def test_the_images_of_a_run_and_of_its_shards_go_by_their_numbers():
    """Whichever there are to choose from: an attack has those of its log."""
    there = range(1, 20)
    assert RunSettings(skip=3, max=12).chosen(there) == [3, 6, 9]
    assert RunSettings().chosen(there) == list(there)
    shards = [RunSettings(skip=3, shard=(number, 4)).chosen(there) for number in (1, 2, 3, 4)]
    assert shards == [[3, 15], [6, 18], [9], [12]]
    with pytest.raises(UserError, match="no image is chosen by --skip 30 and --max 19"):
        RunSettings(skip=30, max=19).chosen(there)
    with pytest.raises(UserError, match="--shard 7/7 has no image: the run is too small for so many"):
        RunSettings(skip=3, shard=(7, 7)).chosen(there)
