"""Small Python objects as messages of one size: a receiver knows the size in advance."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from cupy_syncbn.arrays import Array

SIZE = 1024
"""Bytes: NCCL's id takes up to 640, as CuPy before 14 has it, and the name of a host at most 256."""


def pack(value: Any) -> Array:
    """Return a small object as SIZE bytes."""
    data = pickle.dumps(value)
    if len(data) > SIZE:
        raise ValueError(f"expected an object of at most {SIZE} bytes as a pickle (got {len(data)})")
    return np.frombuffer(data.ljust(SIZE, b"\0"), np.uint8).copy()


def unpack(data: Array) -> Any:
    """Return the object that `pack` was given."""
    return pickle.loads(data.data)
