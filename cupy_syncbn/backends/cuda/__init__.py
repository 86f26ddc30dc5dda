"""Batch normalization on GPUs, in CuPy and CUDA C++."""
