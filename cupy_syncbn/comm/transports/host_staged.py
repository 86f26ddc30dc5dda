"""Host staging: CuPy arrays go through pinned memory of the host, and MPI carries that."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from cupy_syncbn.arrays import import_cupy
from cupy_syncbn.comm.transports.base import Array, HostGroup, Transport


class HostStaged(Transport):
    """Copies to pinned memory of the host, a message of MPI, and back."""

    name = "mpi"

    def __init__(self, group: HostGroup) -> None:
        self._group = group

    def allreduce(self, buffer: Array) -> Array:
        """Replace a buffer by its sum, and return that in pinned memory, as it is until the next call."""
        host = _on_host(buffer)
        self._group.allreduce(host)
        buffer.set(host)
        return host

    def allreduce_checked(self, vector: Array) -> Array:
        """Do the same to a vector that ends in a trailer."""
        host = _on_host(vector)
        self._group.allreduce_checked(host)
        vector.set(host)
        return host

    def match_peers(self, vector: Array) -> Array:
        """Return `vector` itself: those of the others come by memory of the host too."""
        return vector

    def broadcast(self, buffer: Array, root: int) -> None:
        """Replace a buffer by that of a rank."""
        host = _on_host(buffer)
        self._group.broadcast(host, root)
        buffer.set(host)


_pinned: dict[tuple[int, int, int], tuple[Array, Any]] = {}
"""Memory that is used again, by thread, device and stream, and the stream: another must not get its address.

What a stream copies out is there when the host has waited for it, and by then its copy in before that has
ended too: so one piece is enough for a stream, and one for all would be too few. It is freed only for a
larger one, as a copy in may be under way when the group is gone.
"""


def _on_host(buffer: Array) -> Array:
    """Return a copy of a CuPy array in pinned memory, when it is complete."""
    cupy = import_cupy()
    stream = cupy.cuda.get_current_stream()
    key = threading.get_ident(), buffer.device.id, stream.ptr
    pinned, _ = _pinned.get(key, (None, None))
    if pinned is None or pinned.nbytes < buffer.nbytes:
        memory = cupy.cuda.alloc_pinned_memory(max(buffer.nbytes, 1))
        pinned = np.frombuffer(memory, np.uint8)
    host: Array = pinned[: buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)
    buffer.get(out=host)
    _pinned[key] = pinned, stream  # only now has the copy in ended that may have read a smaller one
    return host
