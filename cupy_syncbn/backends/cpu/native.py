"""Batch normalization by the compiled core: each operation of `interface.Backend` is one call into C++.

The core takes contiguous tensors in this machine's byte order: see `as_kernel_input`. Its sources: core/.
"""

from __future__ import annotations

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.backends.cpu._core import (
    as_kernel_input,
    centered_squares,
    input_gradient,
    normalize,
    reduce_gradients,
    statistics,
)
from cupy_syncbn.backends.cpu.memory import output

__all__ = [
    "as_kernel_input", "centered_squares", "check_device", "empty", "input_gradient", "normalize", "overlaps",
    "reduce_gradients", "statistics",
]  # fmt: skip

empty = output


def overlaps(a: Array, b: Array) -> bool:
    """Tell whether two arrays share memory."""
    return np.shares_memory(a, b)


def check_device(x: Array) -> None:
    """Check nothing: there is one device."""
