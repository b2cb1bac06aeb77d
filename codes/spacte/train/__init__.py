"""Teaching, objectives, the trainer, a training run and its log."""
