"""Batch normalization on CPUs, in NumPy."""
