"""Distributed training of multi-modal, multi-task diffusion models on Ray."""

__version__ = "0.1.0"
