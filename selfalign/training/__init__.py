"""Training: the loop, EMA, checkpoints, metrics, and the held-out denoising loss."""
