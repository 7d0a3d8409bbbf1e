"""Sweeps: what is searched, what it is judged by, and what was found."""
