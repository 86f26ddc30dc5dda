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

import functools

import numpy as np

from cupy_syncbn.arrays import is_cupy, type_name
from cupy_syncbn.backends.cpu import operations as cpu_operations
from cupy_syncbn.backends.interface import Backend


def backend_of(array: object) -> Backend:
    """Return the backend that computes on `array`.

    Raises
    ------
    TypeError
        If `array` is neither a NumPy nor a CuPy array.
    """
    if isinstance(array, np.ndarray):
        return cpu_operations
    if is_cupy(array):
        return _cuda()
    raise TypeError(
        f"expected a NumPy or CuPy array (got {type_name(array)}): "
        "convert it, for instance with numpy.asarray or cupy.asarray"
    )


@functools.cache
def _cuda() -> Backend:
    from cupy_syncbn.backends.cuda import operations  # imports CuPy

    return operations
