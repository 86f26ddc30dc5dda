"""CUDA-aware MPI: the addresses of CuPy arrays are handed to MPI."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cupy_syncbn.arrays import import_cupy
from cupy_syncbn.comm.errors import RankMismatchError
from cupy_syncbn.comm.schedules import FAULT, steps
from cupy_syncbn.comm.transports.base import Array, HostGroup, Transport
from cupy_syncbn.comm.transports.host_staged import HostStaged

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 2
"""Of messages that carry arrays on the GPU; those of `checked_sum` have another."""


class CUDAAware(Transport):
    """Hands addresses on the GPU to MPI. An MPI that does not know them ends with a segmentation fault.

    Sums are made here, on the GPU, from messages between two ranks: Open MPI takes such addresses there, but
    in no collective call that does not wait (its documentation names MPI_Iallreduce and MPI_Ibcast among the
    functions that are not CUDA-aware). What is broadcast, once, goes through the host.
    """

    name = "cuda-aware-mpi"

    def __init__(self, group: HostGroup) -> None:
        self._group = group
        self._through_host = HostStaged(group)
        self._steps = tuple(steps(group.rank, group.size))

    def allreduce(self, buffer: Array) -> Array:
        """Replace a buffer by its sum, and return it."""
        if not self._add_up(buffer):
            raise RankMismatchError("the ranks add up arrays of different sizes")
        return buffer

    def allreduce_checked(self, vector: Array) -> Array:
        """Do the same to a vector that ends in a trailer, and return the trailer in memory of the host."""
        self._add_up(vector, marks_mismatch=True)
        trailer: Array = vector[-3:].get()
        return trailer

    def broadcast(self, buffer: Array, root: int) -> None:
        """Replace a buffer by that of a rank."""
        self._through_host.broadcast(buffer, root)

    def _add_up(self, buffer: Array, marks_mismatch: bool = False) -> bool:
        """Replace a buffer by its sum, and tell whether no message had another length."""
        if not buffer.size:
            return True
        cupy = import_cupy()
        stream = cupy.cuda.get_current_stream()
        own = buffer.reshape(-1).view("u1")  # MPI may have no 16-bit floats
        other = cupy.empty_like(own)
        summand = other.view(buffer.dtype).reshape(buffer.shape)
        is_right = True
        needed = [own, other]
        with self._group.messages(needed) as (comm, wait):
            for partner, sends, receives, replaces in self._steps:
                stream.synchronize()  # MPI knows nothing of streams
                sending = comm.Isend(own, partner, _TAG) if sends else None
                if receives:
                    # None may be longer than its place, and its length is known when it has come.
                    nbytes = wait(_Arrival(comm, partner), partner).count
                    fits = nbytes == own.nbytes
                    needed.append(other if fits else cupy.empty(nbytes, "u1"))
                    wait(comm.Irecv(needed[-1], partner, _TAG), partner)
                if sending is not None:
                    wait(sending, partner)
                if not receives:
                    continue
                if not fits:
                    is_right = False
                    if marks_mismatch:
                        buffer[FAULT] = math.nan
                elif replaces:
                    buffer[...] = summand
                else:
                    buffer += summand
        return is_right


class _Arrival:
    """The arrival of a message, to wait for as for a request."""

    def __init__(self, comm: MPI.Comm, partner: int) -> None:
        self._comm, self._partner = comm, partner

    def Test(self, status: MPI.Status) -> bool:  # noqa: N802, mpi4py's name
        """Tell whether a message has come, and describe it."""
        return self._comm.Iprobe(self._partner, _TAG, status)
