"""What a run over test images leaves on disk: votes, log, configuration."""
