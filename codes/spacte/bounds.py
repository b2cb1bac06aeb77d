"""spacte.smooth.bounds by its earlier, shorter name."""

from spacte.smooth.bounds import *  # noqa: F403
