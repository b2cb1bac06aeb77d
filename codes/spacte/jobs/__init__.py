"""Experiments as jobs, worked off one after the other: after any interruption they go on."""
