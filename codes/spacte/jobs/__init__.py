"""Experiments as jobs, run here or through SLURM, resumed after any interruption."""
