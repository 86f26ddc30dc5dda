"""Memory for results on a CPU: it begins on cache lines, and is used again instead of allocated again.

A loop that writes across cache lines takes twice as long. Fresh memory from the operating system costs a page
fault every 4 KiB, which can take as long as the computation of its contents.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from cupy_syncbn.arrays import Array

CACHE_LINE = 64
"""Bytes."""
SMALL = 1 << 17
"""Bytes below which none of this is worth the effort."""
KEPT_OUTPUTS = 4
"""Outputs without a reference that are kept: y, dx, dresidual, and one more."""
KEPT_BYTES = 320 << 20
"""The most bytes that they have together: all that a process holds of memory that nobody refers to.

The limit is on their sum since page faults cost large outputs as much per byte as small ones. It is no small
multiple of a power of two, as the sizes of common outputs are: four of 64 MiB and their cache lines find
room, three of 98 MiB (float32 of 32x64x112x112), two of 128 MiB, or one of 256 MiB.
"""

_free: deque[Array] = deque()  # its operations are atomic


class _Lease:
    """The base of an output and of all its views: when the last of them goes, it gives back the memory."""

    def __init__(self, buffer: Array) -> None:
        self._buffer = buffer
        start = -buffer.ctypes.data % CACHE_LINE
        self.__array_interface__ = buffer[start : start + buffer.size - CACHE_LINE].__array_interface__

    def __del__(self, free: deque[Array] = _free, most: int = KEPT_BYTES) -> None:
        if self._buffer.size > most:
            return
        free.append(self._buffer)
        try:
            while len(free) > KEPT_OUTPUTS or sum(free[i].size for i in range(len(free))) > most:
                free.popleft()
        except IndexError:  # another thread took it
            pass


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
