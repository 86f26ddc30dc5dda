"""Pinned memory of the host, through which CuPy arrays reach an MPI that knows nothing of GPUs."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Array = Any  # of NumPy or CuPy


class Staging(threading.local):
    """Buffers that are used again, one for each stream and thread.

    What a stream copies out is there when the host has waited for it, and its copy in before that has ended
    by then too: so one buffer is enough for a stream, and one for all would be too few.
    """

    def __init__(self) -> None:
        self._pinned: dict[tuple[int, int], Any] = {}

    def copy_out(self, buffer: Array) -> Array:
        """Return a complete copy of a CuPy array in pinned memory; a NumPy array as it is."""
        if isinstance(buffer, np.ndarray):
            return buffer
        cupy = sys.modules["cupy"]
        key = buffer.device.id, cupy.cuda.get_current_stream().ptr
        pinned = self._pinned.get(key)
        if pinned is None or pinned.nbytes < buffer.nbytes:
            memory = cupy.cuda.alloc_pinned_memory(max(buffer.nbytes, 1))
            pinned = self._pinned[key] = np.frombuffer(memory, np.uint8)
        host: Array = pinned[: buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)
        buffer.get(out=host)
        return host

    def copy_in(self, host: Array, buffer: Array) -> None:
        """Copy what `copy_out` returned back to the buffer, in the order of the current stream."""
        if host is not buffer:
            buffer.set(host)
