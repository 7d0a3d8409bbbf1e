"""Experiments: tables of methods and seeds, trained, measured and compared on the same rows."""
