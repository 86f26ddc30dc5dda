"""The backends: modules with the same operations on the arrays of one library.

A backend computes on (outer, C, inner) arrays and never communicates. It returns the sums that the ranks have
to add up as one float64 vector: see `vector`.
"""

from __future__ import annotations

import functools

import numpy as np

from cupy_syncbn.arrays import import_cupy, is_cupy, is_for_amd, type_name, why_no_gpu
from cupy_syncbn.backends.cpu import loading
from cupy_syncbn.backends.interface import Backend


def backend_of(array: object) -> Backend:
    """Return the backend that computes on `array`.

    Raises
    ------
    TypeError
        If `array` is neither a NumPy nor a CuPy array.
    ValueError
        If CUPY_SYNCBN_ISA is wrong.
    """
    if isinstance(array, np.ndarray):
        loading.check()
        return _CPU
    if is_cupy(array):
        return _cuda()
    raise TypeError(
        f"expected a NumPy or CuPy array (got {type_name(array)}): "
        "convert it, for instance with numpy.asarray or cupy.asarray"
    )


def _cpu() -> Backend:
    if loading.choice().isa == "numpy":
        from cupy_syncbn.backends.cpu import specification

        return specification
    from cupy_syncbn.backends.cpu import native

    return native


_CPU = _cpu()


@functools.cache
def _cuda() -> Backend:
    if is_for_amd(import_cupy()):
        raise RuntimeError(f"no kernels for a CuPy array: {why_no_gpu()}")
    from cupy_syncbn.backends.cuda import operations  # imports CuPy

    return operations
