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
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np

from cupy_syncbn.backends import numpy_backend
from cupy_syncbn.backends.interface import Backend, Running
from cupy_syncbn.backends.layout import Array, Layout

__all__ = [
    "Array",
    "Backend",
    "Layout",
    "Running",
    "array_module",
    "as_array",
    "backend_of",
    "module_of",
    "move",
]

_CUDA = 2
"""The type of device that DLPack calls kDLCUDA."""


def _is_cupy(array: object) -> bool:
    return "cupy" in sys.modules and isinstance(array, sys.modules["cupy"].ndarray)


def as_array(array: Any) -> Any:
    """Return another library's array on a GPU as a CuPy array, without a copy; others as they are."""
    if isinstance(array, np.ndarray) or _is_cupy(array):
        return array
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == _CUDA:
        return import_cupy().from_dlpack(array)
    if hasattr(array, "__cuda_array_interface__"):
        return import_cupy().asarray(array)
    return array


def backend_of(array: object) -> Backend:
    """Return the backend that computes on `array`.

    Raises
    ------
    TypeError
        If `array` is neither a NumPy nor a CuPy array.
    """
    if isinstance(array, np.ndarray):
        return numpy_backend
    if _is_cupy(array):
        return _cupy_backend()
    raise TypeError(
        f"expected a NumPy or CuPy array (got {type(array).__module__}.{type(array).__qualname__}): "
        "convert it, for instance with numpy.asarray or cupy.asarray"
    )


@functools.cache
def _cupy_backend() -> Backend:
    from cupy_syncbn.backends import cupy_backend

    return cupy_backend


def import_cupy() -> ModuleType:
    """Import CuPy.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CuPy is not installed: install cupy-syncbn[cuda12] or cupy-syncbn[cuda13], by the CUDA version "
            "that nvidia-smi shows"
        ) from error
    module: ModuleType = cupy
    return module


@functools.cache
def _why_no_gpu() -> str:
    """Tell why CuPy cannot compute, or nothing if it can."""
    cupy = import_cupy()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA driver that it can use ({error}): see what nvidia-smi says"
    return "" if count else "CuPy sees no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"


def array_module(device: str | None) -> ModuleType:
    """Return the array library of a device.

    Parameters
    ----------
    device : {"cpu", "cuda", None}
        None is what CUPY_SYNCBN_DEVICE says, or "cuda" where CuPy sees a GPU, else "cpu".

    Returns
    -------
    module
        numpy or cupy.

    Raises
    ------
    ValueError
        If there is no such device.
    ModuleNotFoundError
        If `device` is "cuda", and CuPy is not installed.
    RuntimeError
        If `device` is "cuda", and CuPy has no driver or no GPU.
    """
    if device is None:
        device = os.environ.get("CUPY_SYNCBN_DEVICE") or _best_device()
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f"expected device 'cpu', 'cuda' or None (got {device!r})")
    if _why_no_gpu():
        raise RuntimeError(f"device 'cuda': {_why_no_gpu()}")
    return import_cupy()


def _best_device() -> str:
    try:
        return "cpu" if _why_no_gpu() else "cuda"
    except ModuleNotFoundError:
        return "cpu"


def module_of(array: object) -> ModuleType:
    """Return the library of an array: cupy, or numpy for all else."""
    return sys.modules["cupy"] if _is_cupy(array) else np


def move(array: Any, module: ModuleType) -> Array:
    """Return an array, or what NumPy makes one of, as an array of `module`: numpy or cupy."""
    array = as_array(array)
    if module is np and _is_cupy(array):
        array = array.get()
    result: Array = array if _is_cupy(array) else module.asarray(np.asarray(array))
    return result
