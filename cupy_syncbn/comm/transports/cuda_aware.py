"""CUDA-aware MPI: MPI gets the addresses of CuPy arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cupy_syncbn.arrays import import_cupy
from cupy_syncbn.comm.errors import RankMismatchError
from cupy_syncbn.comm.schedules import Step
from cupy_syncbn.comm.small_objects import SIZE
from cupy_syncbn.comm.trailer import FAULT
from cupy_syncbn.comm.transports.base import Array, HostGroup, Transport, missing_for_cupy
from cupy_syncbn.comm.transports.host_staged import HostStaged

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

    from cupy_syncbn.comm.private_comm import PrivateComm

# Tags of messages that carry arrays on the GPU, and of what stands before a slice; `checked_sum` has another.
_WHOLE, _HEAD, _SLICE = 2, 4, 5


class CUDAAware(Transport):
    """Hands addresses on the GPU to MPI. An MPI that does not know them ends with a segmentation fault.

    Sums are made here, on the GPU, from messages between two ranks: Open MPI takes such addresses there, but
    not in collective calls that do not wait (its documentation names MPI_Iallreduce and MPI_Ibcast among the
    functions that are not CUDA-aware). A broadcast happens once, and goes through the host.
    """

    name = "cuda-aware-mpi"

    def __init__(self, group: HostGroup) -> None:
        self._group = group
        self._through_host = HostStaged(group)

    def allreduce_owned(self, buffer: Array) -> Array:
        if not self._add_up(buffer):
            raise RankMismatchError("the ranks add up arrays of different sizes")
        return buffer

    def allreduce_checked(self, vector: Array) -> Array:
        self._add_up(vector, marks_mismatch=True)
        return vector[FAULT:].get()

    def broadcast(self, buffer: Array, root: int) -> None:
        self._through_host.broadcast(buffer, root)

    def _add_up(self, buffer: Array, marks_mismatch: bool = False) -> bool:
        """Replace a buffer by its sum, and tell whether all messages were of such a buffer."""
        if not buffer.size:
            return True
        cupy = import_cupy()
        stream = cupy.cuda.get_current_stream()
        flat = buffer.reshape(-1)
        receive_buffer = cupy.empty_like(flat)
        needed, all_fit = [flat, receive_buffer], True
        with self._group.messages(needed) as private:
            messages = _Messages(private, flat.nbytes, needed)
            halvings = private.schedule.halvings(flat.nbytes)
            for step in private.schedule.steps(private.rank, flat.size, halvings):
                if step.is_slice and step.replaces and not all_fit:
                    continue  # no rank waits for a slice of the sum
                stream.synchronize()  # MPI knows nothing of streams
                if step.sends is not None:
                    messages.send(flat[step.sends], step, all_fit)
                if step.receives is not None:
                    target = flat[step.receives]
                    received = receive_buffer[: target.size]
                    fits = messages.receive(received, step)
                messages.see_off()  # before the buffer is written to
                if step.receives is None:
                    continue
                if not fits:
                    all_fit = False
                    if marks_mismatch:
                        flat[FAULT] = math.nan
                elif step.replaces:
                    target[...] = received
                else:
                    target += received
        return all_fit


class _Messages:
    """The messages of one sum: whole buffers, or slices behind a head that tells what they are slices of."""

    def __init__(self, private: PrivateComm, nbytes: int, needed: list[Any]) -> None:
        self._comm = private.comm
        self._wait = cast("Callable[[Any, int], MPI.Status]", private.wait)
        self._nbytes, self._needed = nbytes, needed
        self._sending: list[tuple[MPI.Request, int]] = []

    def send(self, part: Array, step: Step, all_fit: bool) -> None:
        """Send a part of the buffer; a slice tells also whether all messages so far were of such a buffer."""
        if step.is_slice:
            head = np.array([self._nbytes, all_fit], np.int64)
            self._needed.append(head)
            self._sending.append((self._comm.Isend(head, step.partner, _HEAD), step.partner))
        tag = _SLICE if step.is_slice else _WHOLE
        sent = part.view("u1")  # MPI may have no 16-bit floats
        self._sending.append((self._comm.Isend(sent, step.partner, tag), step.partner))

    def see_off(self) -> None:
        """Wait until what was sent has gone."""
        while self._sending:
            self._wait(*self._sending.pop())

    def receive(self, target: Array, step: Step) -> bool:
        """Receive what a partner sends, and tell whether it is what belongs to `target`."""
        comm, partner = self._comm, step.partner
        fits, tag = True, self._wait(_Arrival(comm, partner, _WHOLE, _HEAD), partner).tag
        if tag == _HEAD:
            head = np.empty(2, np.int64)
            self._needed.append(head)
            self._wait(comm.Irecv(head, partner, _HEAD), partner)
            fits, tag = head.tolist() == [self._nbytes, True], _SLICE
        # No message may be longer than its buffer; its length is known when it has come.
        nbytes = self._wait(_Arrival(comm, partner, tag), partner).count
        fits = fits and nbytes == target.nbytes and step.is_slice == (tag == _SLICE)
        if not fits:
            self._needed.append(import_cupy().empty(nbytes, "u1"))
        buffer = target.view("u1") if fits else self._needed[-1]
        self._wait(comm.Irecv(buffer, partner, tag), partner)
        return fits


class _Arrival:
    """The arrival of a message with one of some tags, to wait for as for a request."""

    def __init__(self, comm: MPI.Comm, partner: int, *tags: int) -> None:
        self._comm, self._partner, self._tags = comm, partner, tags

    def Test(self, status: MPI.Status) -> bool:  # noqa: N802, mpi4py's name
        return any(self._comm.Iprobe(self._partner, tag, status) for tag in self._tags)


def why_no_cupy(group: HostGroup) -> str:
    """Tell why a rank of a group cannot use CuPy, or nothing if all can (**collective**)."""
    missing, _ = missing_for_cupy()
    is_missing = group.gather_numbers(bool(missing))
    if not is_missing.any():
        return ""
    rank = int(is_missing.argmax())
    return f"rank {rank} cannot take part, as {group.broadcast_object(missing[: SIZE // 4], rank)}"
