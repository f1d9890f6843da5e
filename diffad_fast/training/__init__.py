"""Training: the loop, the moving average, checkpoints on disk."""
