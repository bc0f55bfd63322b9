"""What crosses the border of the package: released checkpoints in, models out."""
