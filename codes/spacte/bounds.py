"""spacte.smooth.bounds, and the certificate from all the votes, by their earlier, shorter name."""

from spacte.smooth.bounds import *  # noqa: F403
from spacte.smooth.certificates import multiclass_certificate  # noqa: F401
