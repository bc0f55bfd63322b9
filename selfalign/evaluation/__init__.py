"""Evaluation: feature networks, metrics, reference statistics, and the report on a set of samples."""
