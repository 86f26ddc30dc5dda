"""Host staging: CuPy arrays go through pinned memory of the host, and MPI sends that."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from cupy_syncbn.arrays import import_cupy
from cupy_syncbn.comm.transports.base import Array, HostGroup, Transport


class HostStaged(Transport):
    """Copies an array to pinned memory of the host, calls MPI, and copies it back."""

    name = "mpi"

    def __init__(self, group: HostGroup) -> None:
        self._group = group

    def allreduce(self, buffer: Array) -> Array:
        host = _on_host(buffer)
        self._group.allreduce(host)
        buffer.set(host)
        return host

    def allreduce_checked(self, vector: Array) -> Array:
        host = _on_host(vector)
        self._group.allreduce_checked(host)
        vector.set(host)
        return host

    def match_peers(self, vector: Array) -> Array:
        return vector  # those of the other ranks go through memory of the host too

    def broadcast(self, buffer: Array, root: int) -> None:
        host = _on_host(buffer)
        self._group.broadcast(host, root)
        buffer.set(host)


# Memory that is used again, by thread, device and stream; and the stream: no other must get its address.
# When the host has waited for a copy out, the stream's copy in before it has ended too: so one piece per
# stream is enough. It is freed only for a larger one, as a copy in may be under way when the group is gone.
_pinned: dict[tuple[int, int, int], tuple[Array, Any]] = {}


def _on_host(buffer: Array) -> Array:
    """Return a complete copy of a CuPy array in pinned memory."""
    cupy = import_cupy()
    stream = cupy.cuda.get_current_stream()
    key = threading.get_ident(), buffer.device.id, stream.ptr
    pinned, _ = _pinned.get(key, (None, None))
    if pinned is None or pinned.nbytes < buffer.nbytes:
        memory = cupy.cuda.alloc_pinned_memory(max(buffer.nbytes, 1))
        pinned = np.frombuffer(memory, np.uint8)
    host: Array = pinned[: buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)
    buffer.get(out=host)
    _pinned[key] = pinned, stream  # only now, as the last copy in may have read the smaller piece until here
    return host
