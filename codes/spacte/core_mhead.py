"""spacte.smooth.core_mhead by its earlier, shorter name."""

from spacte.smooth.core_mhead import *  # noqa: F403
