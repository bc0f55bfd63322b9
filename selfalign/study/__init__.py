"""Grids of runs over variants and seeds, their statistics, and the report."""
