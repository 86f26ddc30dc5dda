"""Memory of the NumPy backend: it begins on cache lines, and is used again instead of allocated again.

A loop that writes across cache lines takes twice as long. Fresh memory from the operating system costs a page
fault every 4 KiB, which can take as long as the computation of its contents.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any

import numpy as np

from cupy_syncbn.arrays import Array

CACHE_LINE = 64
"""Bytes."""
KEPT_OUTPUTS = 4
"""Outputs without a reference that are kept: y, dx, dresidual, and one more."""
SMALL = 1 << 17
"""Bytes below which none of this is worth the effort."""
LARGEST_KEPT = 1 << 25
"""Bytes of the largest output that is kept; all of them have at most 128 MiB."""


def _aligned(buffer: Array) -> Array:
    """Return the bytes of a buffer from its first cache line on, one line less in all."""
    start = -buffer.ctypes.data % CACHE_LINE
    return buffer[start : start + buffer.size - CACHE_LINE]


class _Scratch(threading.local):
    """Named buffers that each thread allocates once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}
        self._views: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        view = self._views.get(name)
        if view is None or view.shape != shape or view.dtype != dtype:
            nbytes = math.prod(shape) * dtype.itemsize
            buffer = self._buffers.get(name)
            if buffer is None or buffer.nbytes < nbytes:
                buffer = self._buffers[name] = _aligned(np.empty(nbytes + CACHE_LINE, np.uint8))
            view = self._views[name] = buffer[:nbytes].view(dtype).reshape(shape)
        return view


scratch = _Scratch()

_free: deque[Array] = deque(maxlen=KEPT_OUTPUTS)  # its operations are atomic


class _Lease:
    """The base of an output and of all its views: when the last of them goes, it gives back the memory."""

    def __init__(self, buffer: Array) -> None:
        self._buffer = buffer
        self.__array_interface__ = _aligned(buffer).__array_interface__

    def __del__(self, free: deque[Array] = _free) -> None:
        if self._buffer.size <= LARGEST_KEPT:
            free.append(self._buffer)


def output(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Allocate an array for a result."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL:
        return np.empty(shape, dtype)
    size = nbytes + CACHE_LINE
    buffer = None
    for _ in range(len(_free)):
        try:
            candidate = _free.pop()  # the last released first: a cache may still hold it
        except IndexError:  # another thread took it
            break
        if candidate.size == size:
            buffer = candidate
            break
        _free.appendleft(candidate)
    lease = _Lease(np.empty(size, np.uint8) if buffer is None else buffer)
    return np.asarray(lease).view(dtype).reshape(shape)
