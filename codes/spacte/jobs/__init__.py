"""Experiments as jobs, run one after the other: they resume after any interruption."""
