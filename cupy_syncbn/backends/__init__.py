"""The backends: modules with the same operations on the arrays of one library.

A backend computes on (outer, C, inner) arrays and never communicates: what ranks have to add up, it
returns as one float64 vector. In the forward that is, with one pivot a channel,

    [count * pivot (C) | count * pivot² (C) | Σ(x - pivot) (C) | Σ(x - pivot)² + 2 pivot Σ(x - pivot) (C)
     | count | fault | tag | tag²]

A rank's pivot is a value near its mean, rounded to 12 significant bits, so that both products with it are
exact: 24 bits of pivot² and a count below 2^29 fit into the 53 bits of a float64. Re-centred on a common
pivot after the sum, they cancel exactly, and the variance keeps its accuracy at any offset. The shorter
[count * mean | m2 + count * mean² | ...] loses 1e-16 mean²/var of it: 3e-6 at a mean of 1e5 standard
deviations, which float32 data can show (`scripts/benchmarks/accuracy.py`). Where zero lies within the
data the pivot is zero, and the vector is the plain [0 | 0 | Σx | Σx² | ...].

In the backward the vector is ``[sum_dy (C) | sum_dy_xmu (C) | fault | tag | tag²]``. Its last three, the
trailer, are the caller's.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from cupy_syncbn.backends import numpy_backend
from cupy_syncbn.backends.interface import Backend, Running
from cupy_syncbn.backends.layout import Array, Layout

__all__ = ["Array", "Backend", "Layout", "Running", "array_module", "backend_of"]


def backend_of(array: object) -> Backend:
    """Return the backend that computes on `array`.

    Raises
    ------
    TypeError
        If `array` is not a NumPy array.
    """
    if isinstance(array, np.ndarray):
        return numpy_backend
    raise TypeError(
        f"expected a NumPy array (got {type(array).__module__}.{type(array).__qualname__}): "
        "convert it, for instance with numpy.asarray"
    )


def array_module(device: str | None) -> ModuleType:
    """Return the array library of `device`; None is the best one there is.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if device in (None, "cpu"):
        return np
    raise ValueError(f"expected device 'cpu' or None (got {device!r}): this version computes with NumPy only")
