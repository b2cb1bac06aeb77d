"""spacte.train.teaching by its earlier, shorter name."""

from spacte.train.teaching import *  # noqa: F403
