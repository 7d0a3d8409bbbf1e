"""Sweeps: the search space, the metrics, the trials, and the report."""
