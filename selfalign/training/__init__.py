"""Training: the loop, EMA, checkpoints, metrics, and the held-out denoising loss."""

from selfalign.training.ema import EMA
from selfalign.training.loop import Monitor, TrainingState, train

__all__ = ["EMA", "Monitor", "TrainingState", "train"]
