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
        return self.allreduce_owned(buffer)  # MPI gets other memory in any case

    def allreduce_owned(self, buffer: Array) -> Array:
        with _Staging(buffer, 2) as (sent, received):
            self._group.allreduce_into(sent, received)
        buffer.set(received)
        return received

    def allreduce_checked(self, vector: Array) -> Array:
        with _Staging(vector) as (host,):
            self._group.allreduce_checked(host)
        vector.set(host)
        return host

    def tell_fault(self, trailer: tuple[float, ...], length: int) -> Array:
        return self._group.tell_fault(trailer, length, np)  # as vectors go through memory of the host

    def broadcast(self, buffer: Array, root: int) -> None:
        with _Staging(buffer) as (host,):
            self._group.broadcast_into(host, root)
        buffer.set(host)


# Memory that is used again, by thread, device and stream; and the stream: no other must get its address.
# When the host has waited for a copy out, the stream's copy in before it has ended too: so one piece per
# stream is enough. It is freed only for a larger one, as a copy in may be under way when the group is gone.
_pinned: dict[tuple[int, int, int], tuple[Array, Any]] = {}


class _Staging:
    """The context of one use of pinned memory: the first of `pieces` like a CuPy array has its values."""

    def __init__(self, buffer: Array, pieces: int = 1) -> None:
        cupy = import_cupy()
        stream = cupy.cuda.get_current_stream()
        self._key = threading.get_ident(), buffer.device.id, stream.ptr
        pinned, _ = _pinned.get(self._key, (None, None))
        if pinned is None or pinned.nbytes < pieces * buffer.nbytes:
            memory = cupy.cuda.alloc_pinned_memory(max(pieces * buffer.nbytes, 1))
            pinned = np.frombuffer(memory, np.uint8)
        rows = pinned[: pieces * buffer.nbytes].reshape(pieces, buffer.nbytes)
        self._pieces = [row.view(buffer.dtype).reshape(buffer.shape) for row in rows]
        buffer.get(out=self._pieces[0])
        # Only now, as the last copy in may have read the smaller piece until here.
        _pinned[self._key] = pinned, stream

    def __enter__(self) -> list[Array]:
        return self._pieces

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            _pinned.pop(self._key, None)  # MPI may still write to it
