"""Batch normalization on CPUs."""
