"""Samples and exports of a trained model."""
