"""Data sets, and the stream that makes each step's batch a function of the step."""
