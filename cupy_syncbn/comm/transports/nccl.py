"""NCCL: operations on the current stream of the GPU, for which the host does not wait."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from cupy_syncbn.arrays import import_cupy
from cupy_syncbn.comm.clock import RunningClock
from cupy_syncbn.comm.errors import CollectiveTimeoutError
from cupy_syncbn.comm.small_objects import SIZE, number_of
from cupy_syncbn.comm.trailer import LENGTH
from cupy_syncbn.comm.transports.base import Array, HostGroup, Transport, missing_for_cupy

_PERIOD = 0.1  # seconds between two looks at the operations
_LEAVING = 10.0  # seconds that the host has to leave a call of NCCL before an abort
_NOT_READY = 600  # CUDA's cudaErrorNotReady: the stream has not come to an event


class NCCL(Transport):
    """Enqueues NCCL's operations on the current stream: the host waits for nothing.

    So the trailer of a sum is looked at when the GPU has it: at the group's next sum, in `check_errors`, and
    by a thread that watches meanwhile. That thread aborts the communicator after an error: of a trailer, of
    NCCL, or of an operation that exceeds the group's timeout. Otherwise the stream might wait for ever.
    """

    name = "nccl"

    def __init__(self, group: HostGroup) -> None:
        missing = why_no_nccl(group)
        if missing:
            raise RuntimeError(f"transport 'nccl': {missing}")
        self._nccl = import_nccl()
        unique_id = _unique_id(self._nccl, group)
        self._device = import_cupy().cuda.runtime.getDevice()
        communicator = _communicator(self._nccl, unique_id, group, self._device)
        self._operations = _Operations(communicator, self._device, group)
        self._captured: list[_Operation] = []
        threading.Thread(target=self._operations.watch, name="cupy_syncbn NCCL", daemon=True).start()
        # At exit the thread is left as it is: to end in order, NCCL would wait for the other ranks.
        weakref.finalize(self, self._operations.close).atexit = False

    def allreduce(self, buffer: Array) -> Array:
        super().allreduce(buffer)
        self._watch_copy()
        return buffer

    def allreduce_owned(self, buffer: Array) -> Array:
        kind = getattr(self._nccl, f"NCCL_{buffer.dtype.name.upper()}", None)
        if kind is None:
            raise TypeError(f"expected a type that NCCL adds up (got {buffer.dtype.name})")
        add = self._nccl.NCCL_SUM
        self._enqueue(buffer, lambda nccl, at, stream: nccl.allReduce(at, at, buffer.size, kind, add, stream))
        return buffer

    def broadcast(self, buffer: Array, root: int) -> None:
        kind, copy = self._nccl.NCCL_UINT8, buffer.copy()
        self._enqueue(
            copy, lambda nccl, at, stream: nccl.broadcast(at, at, buffer.nbytes, kind, root, stream)
        )
        buffer[...] = copy
        self._watch_copy()

    def _watch_copy(self) -> None:
        """Let `check_errors` wait for the copy of a result to the caller's array as well."""
        self._operations.add(_Operation(), import_cupy().cuda.get_current_stream())

    def _enqueue(self, buffer: Array, enqueue: Callable[[Any, int, int], None]) -> None:
        """Enqueue an operation on an array of the package."""
        self._operations.raise_errors()
        if buffer.device.id != self._device:
            raise ValueError(
                f"expected an array on device {self._device}, which NCCL's communicator was made for "
                f"(got one on {buffer.device.id})"
            )
        if buffer.size:
            self._operations.enqueue(enqueue, buffer, import_cupy().cuda.get_current_stream())

    def mailbox(self) -> Array:
        # CUDA lets kernels write to pinned memory at the address that the host has for it.
        memory = import_cupy().cuda.alloc_pinned_memory(LENGTH * np.dtype(np.float64).itemsize)
        mailbox = np.frombuffer(memory, np.float64, LENGTH)
        mailbox[:] = 0  # of a graph that was captured and not launched, nothing is wrong
        return mailbox

    def defer(
        self, trailer: Array, check: Callable[[list[float]], None], call: object, mailbox: Array | None = None
    ) -> None:
        told = self.mailbox() if mailbox is None else mailbox
        if mailbox is None:
            trailer.get(out=told, blocking=False)
        operation = _Operation(call, lambda: check(told.tolist()))
        if not self._operations.add(operation, import_cupy().cuda.get_current_stream()):
            self._captured.append(operation)

    def check_errors(self) -> None:
        if self._captured:  # graphs that the stream was given
            self._operations.add(_Operation(), import_cupy().cuda.get_current_stream())
        self._operations.wait()
        self._operations.look(self._captured)
        self._operations.raise_errors()


@dataclass(eq=False, slots=True)
class _Operation:
    """An operation on the GPU, as the host sees it."""

    call: object = None
    look: Callable[[], None] = lambda: None
    """Raises the error that the trailer tells of."""
    event: Any = None
    """Recorded behind the operation; None while the host is still in NCCL's call, which may wait too."""
    needed: Any = None
    """An array that it writes to, which must live as long."""
    since: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        if self.event is None:
            return False
        runtime = import_cupy().cuda.runtime
        status = runtime.eventQuery(self.event.ptr)
        if status not in (0, _NOT_READY):  # such as an illegal address, after which nothing ends any more
            raise runtime.CUDARuntimeError(status)
        return bool(status == 0)


class _Operations:
    """The operations of a communicator whose end the host has not seen, and the first error among them."""

    def __init__(self, communicator: Any, device: int, group: HostGroup) -> None:
        self._communicator, self._device = communicator, device
        self._timeout = group.timeout
        self._rank = f"rank {group.rank} of {group.size}"
        self._lock = threading.Lock()
        self._pending: deque[_Operation] = deque()
        self._first: _Operation | None = None  # of those pending, when the thread last looked
        self._clock = RunningClock()  # since it is the first
        self._error: Exception | None = None
        self._closed = False

    def enqueue(self, enqueue: Callable[[Any, int, int], None], buffer: Array, stream: Any) -> None:
        """Call a function that enqueues an operation, and watch that from now on."""
        operation = _Operation(needed=buffer)
        with self._lock:
            if self._error:
                raise self._error.with_traceback(None)
            self._pending.append(operation)
        try:
            enqueue(self._communicator, buffer.data.ptr, stream.ptr)
            operation.event = _event_behind(stream)
        except RuntimeError:
            self.raise_errors()  # the communicator may have been aborted meanwhile
            raise
        finally:
            if operation.event is None:  # it failed, or is part of a graph
                with self._lock:
                    self._pending.remove(operation)

    def add(self, operation: _Operation, stream: Any) -> bool:
        """Watch an operation at the end of a stream; return False where a graph captures that."""
        operation.event = _event_behind(stream)
        if operation.event is not None:
            with self._lock:
                self._pending.append(operation)
        return operation.event is not None

    def raise_errors(self) -> None:
        """Raise the first error of the operations that have ended."""
        self.look()
        if self._error:
            raise self._error.with_traceback(None)

    def wait(self) -> None:
        """Wait for all operations, or the first error."""
        self.look()
        while self._pending and not self._error:
            time.sleep(1e-4)
            self.look()

    def look(self, others: Iterable[_Operation] = ()) -> None:
        """Look at the operations that have ended, and at others that have."""
        with self._keep_error():
            self._look()
            for operation in others:
                operation.look()

    def watch(self) -> None:
        """Look on from a thread of its own, which ends the communicator at last."""
        import_cupy().cuda.runtime.setDevice(self._device)  # or a query would take up memory of device 0
        while not self._error and (self._pending or not self._closed):
            time.sleep(min(_PERIOD, self._timeout / 4))
            with self._keep_error():
                self._look()
                self._check_progress()
        # Both calls may wait for the other ranks. Memory that the GPU may still write to stays in `_pending`.
        if self._error:
            while self._host_is_inside():
                time.sleep(1e-3)
            self._communicator.abort()
        else:
            self._communicator.destroy()

    def _host_is_inside(self) -> bool:
        """Tell whether the host is in a call of NCCL and not stuck: an abort would end the call under it."""
        patience = min(self._timeout, _LEAVING)
        with self._lock:
            return any(
                operation.event is None and time.monotonic() < operation.since + patience
                for operation in self._pending
            )

    def close(self) -> None:
        """Let the thread end after the last operation. The garbage collector calls this, anywhere."""
        self._closed = True

    def _look(self) -> None:
        while not self._error and self._pending and self._pending[0].ended:
            self._first = None  # which refers to the group, that may end now
            self._pending.popleft().look()

    def _check_progress(self) -> None:
        """Raise an error if an operation takes too long, or NCCL reports one."""
        if self._pending:
            if self._pending[0] is not self._first:
                self._first, self._clock = self._pending[0], RunningClock()
            if self._clock.look() > self._timeout:
                # The first is a sum itself; the check of its trailer is right behind it, and knows the call.
                call = next((each.call for each in islice(self._pending, 2) if each.call), None)
                raise CollectiveTimeoutError(
                    f"{self._rank} waited {self._timeout:g} s for the other ranks, in an operation of NCCL: "
                    "a rank ended, is stuck, or did not make this call",
                    call,
                )
        self._communicator.check_async_error()

    @contextlib.contextmanager
    def _keep_error(self) -> Iterator[None]:
        """Hold the lock, and keep the first error inside."""
        with self._lock:
            try:
                yield
            except Exception as error:
                self._error = self._error or error.with_traceback(None)  # which would keep all this alive


def _event_behind(stream: Any) -> Any:
    """Return an event at the end of a stream; None if a graph captures that."""
    cupy = import_cupy()
    if stream.ptr and cupy.cuda.runtime.streamIsCapturing(stream.ptr):
        return None
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event


def _unique_id(nccl: Any, group: HostGroup) -> Any:
    """Return rank 0's unique id, or raise its error on all ranks (**collective**)."""
    unique_id = None
    if group.rank == 0:
        try:
            unique_id = nccl.get_unique_id()
        except RuntimeError as error:
            unique_id = f"rank 0: {error}"[: SIZE // 4]
    unique_id = group.broadcast_object(unique_id)
    if isinstance(unique_id, str):
        raise RuntimeError(f"transport 'nccl': {unique_id}")
    return unique_id


def _communicator(nccl: Any, unique_id: Any, group: HostGroup, device: int) -> Any:
    """Return NCCL's communicator, or raise the error of a rank on all ranks (**collective**)."""
    made: list[Any] = []

    def make() -> None:
        try:
            import_cupy().cuda.runtime.setDevice(device)
            made.append(nccl.NcclCommunicator(group.size, unique_id, group.rank))
        except Exception as error:
            made.append(error)

    # NCCL waits for all ranks, without an end if one has failed: so a thread does, which is left behind.
    thread = threading.Thread(target=make, name="cupy_syncbn NCCL's start", daemon=True)
    thread.start()
    # Half of it, as a rank that has failed waits below for those that wait here.
    patience = min(group.timeout / 2, threading.TIMEOUT_MAX)
    thread.join(patience)
    communicator: Any = made[0] if made else None
    outcome = (0, "")
    if communicator is None:
        outcome = (1, f"it waited {patience:g} s for the other ranks")
    elif isinstance(communicator, Exception):
        outcome = (2, str(communicator)[: SIZE // 4])
    everyones = group.gather_numbers(outcome[0])
    worst = int(everyones.argmax())  # an error rather than a wait for the rank that has it
    if everyones[worst]:
        if outcome[0] == 0:
            communicator.abort()
        reason = group.broadcast_object(outcome[1], worst)
        raise RuntimeError(f"transport 'nccl': NCCL made no communicator on rank {worst}: {reason}")
    return communicator


def import_nccl() -> Any:
    """Import CuPy's module of NCCL."""
    import_cupy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the library is missing; `available` tells as well
        from cupy.cuda import nccl

    return nccl


def missing_for_nccl() -> tuple[str, str]:
    """Tell why this process cannot use NCCL, or nothing, and which GPU it has."""
    missing, gpu = missing_for_cupy()
    if missing:
        return missing, ""
    with contextlib.suppress(ImportError):
        if getattr(import_nccl(), "available", False):
            return "", gpu
    return "CuPy finds no NCCL: install nvidia-nccl-cu12 or nvidia-nccl-cu13, by the CUDA version of CuPy", ""


def why_no_nccl(group: HostGroup) -> str:
    """Tell why NCCL cannot serve a group, or nothing if it can (**collective**)."""
    missing, gpu = missing_for_nccl()
    gpus = group.gather_numbers(0 if missing else number_of(f"{group.host} {gpu}"))
    if not gpus.all():
        rank = int((gpus == 0).argmax())
        return f"rank {rank} cannot take part, as {group.broadcast_object(missing[: SIZE // 4], rank)}"
    _, first = np.unique(gpus, return_index=True)
    if first.size == group.size:
        return ""
    second = int(np.setdiff1d(np.arange(group.size), first)[0])
    owner = int((gpus == gpus[second]).argmax())
    where = group.broadcast_object(f"GPU {gpu} of {group.host}", second)
    return (
        f"ranks {owner} and {second} share {where}, and NCCL wants one a rank: "
        "call bind_device() at the start, or start fewer ranks"
    )
