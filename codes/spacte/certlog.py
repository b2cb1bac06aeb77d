"""spacte.logs.certlog by its earlier, shorter name."""

from spacte.logs.certlog import *  # noqa: F403
