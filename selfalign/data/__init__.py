"""Data sets, and the stream that makes each step's batch a function of the step."""

from selfalign.data.datasets import DataSource, Split, open_data
from selfalign.data.stream import training_batches

__all__ = ["DataSource", "Split", "open_data", "training_batches"]
