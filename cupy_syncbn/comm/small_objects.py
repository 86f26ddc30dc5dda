"""Small Python objects as messages of one size, which a receiver knows in advance; texts as eight bytes."""

from __future__ import annotations

import hashlib
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


def number_of(text: str) -> int:
    """Return a positive int64 that stands for a text: what all ranks know of each other takes eight bytes.

    Of two texts it is the same with a probability of 2^-63.
    """
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1) or 1
