"""Sweeps on Ray Tune: trials, schedulers, the searcher, one cache of the data for all trials."""
