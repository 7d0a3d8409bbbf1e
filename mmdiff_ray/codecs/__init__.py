"""Frozen autoencoders between pictures and latents."""
