"""How CuPy arrays travel between ranks: through the host, by an MPI that knows GPUs, or by NCCL.

A transport has `allreduce` (sum) and `broadcast`, both in place. Arrays are ready in the order of the current
stream, and so are the results.
"""

from __future__ import annotations

import pickle
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from cupy_syncbn.errors import CollectiveTimeoutError

if TYPE_CHECKING:
    from cupy_syncbn.process_group import MPIProcessGroup

Array: TypeAlias = Any  # of NumPy or CuPy

_PACKED = 512
"""Bytes: NCCL's id has 128, the name of a host at most 256."""

TRANSPORTS = ("auto", "mpi", "cuda-aware-mpi", "nccl")


class Transport(Protocol):
    """What carries CuPy arrays for a group."""

    name: str

    def allreduce(self, buffer: Array) -> Array:
        """Replace a buffer by its sum; return it, or a copy of the sum in memory of the host."""

    def exchange(self, vector: Array) -> Array:
        """Do the same to a vector that ends in a trailer, and return what ends in its sum."""

    def broadcast(self, buffer: Array, root: int) -> None:
        """Replace a buffer by that of a rank."""


class HostStaged:
    """Copies to pinned memory of the host, a message of MPI, and back."""

    name = "mpi"

    def __init__(self, group: MPIProcessGroup) -> None:
        self._group = group
        self._pinned = _Pinned()

    def allreduce(self, buffer: Array) -> Array:
        """Replace a buffer by its sum, and return that in pinned memory, as it is until the next call."""
        host = self._pinned.copy(buffer)
        self._group.allreduce(host)
        buffer.set(host)
        return host

    def exchange(self, vector: Array) -> Array:
        """Do the same to a vector that ends in a trailer."""
        host = self._pinned.copy(vector)
        self._group.exchange(host)
        vector.set(host)
        return host

    def broadcast(self, buffer: Array, root: int) -> None:
        """Replace a buffer by that of a rank."""
        host = self._pinned.copy(buffer)
        self._group.broadcast(host, root)
        buffer.set(host)


class _Pinned(threading.local):
    """Buffers that are used again, one for each stream and thread.

    What a stream copies out is there when the host has waited for it, and by then its copy in before that has
    ended too: so one buffer is enough for a stream, and one for all would be too few.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Array] = {}

    def copy(self, buffer: Array) -> Array:
        """Return a copy of a CuPy array, when it is complete."""
        cupy = _cupy()
        key = buffer.device.id, cupy.cuda.get_current_stream().ptr
        pinned = self._buffers.get(key)
        if pinned is None or pinned.nbytes < buffer.nbytes:
            memory = cupy.cuda.alloc_pinned_memory(max(buffer.nbytes, 1))
            pinned = self._buffers[key] = np.frombuffer(memory, np.uint8)
        host: Array = pinned[: buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)
        buffer.get(out=host)
        return host


class CUDAAware:
    """Hands addresses on the GPU to MPI. An MPI that does not know them ends with a segmentation fault."""

    name = "cuda-aware-mpi"

    def __init__(self, group: MPIProcessGroup) -> None:
        self._group = group

    def allreduce(self, buffer: Array) -> Array:
        """Replace a buffer by its sum, and return it."""
        _cupy().cuda.get_current_stream().synchronize()  # MPI knows nothing of streams
        self._group.allreduce_in_place(buffer)
        return buffer

    def exchange(self, vector: Array) -> Array:
        """Do the same to a vector that ends in a trailer, and return the trailer in memory of the host."""
        trailer: Array = self.allreduce(vector)[-3:].get()
        return trailer

    def broadcast(self, buffer: Array, root: int) -> None:
        """Replace a buffer by that of a rank."""
        _cupy().cuda.get_current_stream().synchronize()
        self._group.broadcast_in_place(buffer, root)


class NCCL:
    """Enqueues NCCL's operations on the current stream: the host waits for nothing.

    What an exchange tells of faults is therefore looked at when the GPU has it: at the group's next exchange,
    or in `check_errors`. A thread watches meanwhile, and aborts the communicator if an exchange has not ended
    by the group's timeout, or NCCL reports an error: otherwise the stream would wait for ever.

    Parameters
    ----------
    group : MPIProcessGroup
        The ranks, each with a GPU of its own as its current device; their messages carry NCCL's unique id.

    Raises
    ------
    RuntimeError
        If NCCL is missing on a rank, or two ranks share a GPU.

    Notes
    -----
    **Collective.**
    """

    name = "nccl"

    def __init__(self, group: MPIProcessGroup) -> None:
        missing = why_no_nccl(group)
        if missing:
            raise RuntimeError(f"transport 'nccl': {missing}")
        nccl = _nccl()
        self._types = {
            "float16": nccl.NCCL_FLOAT16,
            "bfloat16": nccl.NCCL_BFLOAT16,
            "float32": nccl.NCCL_FLOAT32,
            "float64": nccl.NCCL_FLOAT64,
        }
        self._sum, self._byte = nccl.NCCL_SUM, nccl.NCCL_UINT8
        unique_id = group.broadcast_object(nccl.get_unique_id() if group.rank == 0 else None)
        self._device = _cupy().cuda.runtime.getDevice()
        self._communicator: Any = nccl.NcclCommunicator(group.size, unique_id, group.rank)
        self._timeout = group.timeout
        self._lock = threading.RLock()
        self._pending: deque[_Pending] = deque()
        self._captured: list[_Pending] = []
        self._error: Exception | None = None
        period = min(1.0, self._timeout / 4)
        threading.Thread(target=_watch, args=(weakref.ref(self), period), daemon=True).start()

    def allreduce(self, buffer: Array) -> Array:
        """Replace a buffer by its sum, and return it."""
        pointer, stream = self._prepare(buffer)
        kind = self._types[buffer.dtype.name]
        self._communicator.allReduce(pointer, pointer, buffer.size, kind, self._sum, stream)
        return buffer

    exchange = allreduce

    def broadcast(self, buffer: Array, root: int) -> None:
        """Replace a buffer by that of a rank."""
        pointer, stream = self._prepare(buffer)
        self._communicator.broadcast(pointer, pointer, buffer.nbytes, self._byte, root, stream)

    def _prepare(self, buffer: Array) -> tuple[int, int]:
        self.raise_errors()
        if buffer.device.id != self._device:
            raise ValueError(
                f"expected an array on device {self._device}, which NCCL's communicator was made for "
                f"(got one on {buffer.device.id})"
            )
        return buffer.data.ptr, _cupy().cuda.get_current_stream().ptr

    def defer(self, trailer: Array, check: Callable[[list[float]], None]) -> None:
        """Show the trailer of an exchange to `check` when the GPU has it; what that raises is raised then."""
        cupy = _cupy()
        memory = cupy.cuda.alloc_pinned_memory(trailer.nbytes)
        pinned = np.frombuffer(memory, trailer.dtype, trailer.size)
        pinned[:] = 0
        trailer.get(out=pinned, blocking=False)
        stream = cupy.cuda.get_current_stream()
        if stream.ptr and cupy.cuda.runtime.streamIsCapturing(stream.ptr):
            self._captured.append(_Pending(None, pinned, check, 0.0))  # each replay writes to it
            return
        event = cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        with self._lock:
            self._pending.append(_Pending(event, pinned, check, time.monotonic()))

    def raise_errors(self, *, wait: bool = False) -> None:
        """Raise the first error of the exchanges that have ended, or of all; then NCCL is aborted."""
        while wait and not self._error and self._pending and not self._pending[0].event.done:
            time.sleep(1e-4)
        with self._lock:
            try:
                while self._pending and not self._error and self._pending[0].event.done:
                    pending = self._pending.popleft()
                    pending.check(pending.trailer.tolist())
                if wait and not self._error:
                    for pending in self._captured:
                        pending.check(pending.trailer.tolist())
            except RuntimeError as error:
                self._abort(error)
            if self._error:
                raise self._error

    def look(self) -> None:
        """Abort the communicator if an exchange takes too long, or NCCL reports an error."""
        with self._lock:
            if self._error:
                return
            if self._pending and not self._pending[0].event.done:
                waited = time.monotonic() - self._pending[0].since
                if waited > self._timeout:
                    message = f"the GPU waited {self._timeout:g} s for the other ranks in an exchange by NCCL"
                    self._abort(CollectiveTimeoutError(message))
                    return
            try:
                self._communicator.check_async_error()
            except RuntimeError as error:
                self._abort(error)

    def _abort(self, error: Exception) -> None:
        """End all operations under way, so that their streams go on; their results are undefined."""
        self._error = error
        self._pending.clear()
        self._communicator.abort()


class _Pending(NamedTuple):
    """An exchange whose trailer the host has not seen."""

    event: Any
    """None in a graph."""
    trailer: Array
    """In pinned memory."""
    check: Callable[[list[float]], None]
    since: float


def _watch(transport: weakref.ref[NCCL], period: float) -> None:
    while True:
        time.sleep(period)
        watched = transport()
        if watched is None or watched._error:
            return
        watched.look()
        del watched


def _cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "CuPy is not installed: install cupy-syncbn[cuda12] or cupy-syncbn[cuda13]"
        ) from error
    return cupy


def _nccl() -> Any:
    _cupy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the library is missing; `available` tells as well
        from cupy.cuda import nccl

    return nccl


def why_no_nccl(group: MPIProcessGroup) -> str:
    """Tell why NCCL cannot serve a group, or nothing if it can (**collective**)."""
    cupy = _cupy()
    try:
        has_nccl = bool(getattr(_nccl(), "available", False))
    except ImportError:
        has_nccl = False
    gpu = cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.runtime.getDevice())
    ranks: list[tuple[bool, str, str]] = group.gather_objects((has_nccl, group.host, gpu))
    without = [rank for rank, (found, _, _) in enumerate(ranks) if not found]
    if without:
        return (
            f"CuPy finds no NCCL on rank {without[0]}: install nvidia-nccl-cu12 or nvidia-nccl-cu13, by the "
            "CUDA version of CuPy"
        )
    owners: dict[tuple[str, str], int] = {}
    for rank, (_, host, pci) in enumerate(ranks):
        if (host, pci) in owners:
            return (
                f"ranks {owners[host, pci]} and {rank} share GPU {pci} of {host}, and NCCL wants one a rank: "
                "call bind_device() at the start, or start fewer ranks"
            )
        owners[host, pci] = rank
    return ""


def transport_for(group: MPIProcessGroup, name: str) -> Transport:
    """Return the transport of a name; "auto" is NCCL where that can serve the group, else "mpi"."""
    if name == "nccl":
        return NCCL(group)
    if name == "cuda-aware-mpi":
        return CUDAAware(group)
    if name == "auto" and not why_no_nccl(group):
        return NCCL(group)
    return HostStaged(group)


def pack(value: Any) -> Array:
    """Return a small object as _PACKED bytes, as the ranks that wait for it cannot know its size."""
    return np.frombuffer(pickle.dumps(value).ljust(_PACKED, b"\0"), np.uint8).copy()
