"""CUDA-aware MPI: MPI gets the addresses of CuPy arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from cupy_syncbn.arrays import import_cupy
from cupy_syncbn.comm.errors import RankMismatchError
from cupy_syncbn.comm.schedules import steps
from cupy_syncbn.comm.small_objects import SIZE
from cupy_syncbn.comm.trailer import FAULT
from cupy_syncbn.comm.transports.base import Array, HostGroup, Transport, missing_for_cupy
from cupy_syncbn.comm.transports.host_staged import HostStaged

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

_TAG = 2  # of messages that carry arrays on the GPU; those of `checked_sum` have another


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
        self._steps = tuple(steps(group.rank, group.size))

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
        """Replace a buffer by its sum, and tell whether all messages had its length."""
        if not buffer.size:
            return True
        cupy = import_cupy()
        stream = cupy.cuda.get_current_stream()
        sent = buffer.reshape(-1).view("u1")  # MPI may have no 16-bit floats
        receive_buffer = cupy.empty_like(sent)
        received = receive_buffer.view(buffer.dtype).reshape(buffer.shape)
        needed, all_fit = [sent, receive_buffer], True
        with self._group.messages(needed) as private:
            comm, wait = private.comm, cast("Callable[[Any, int], MPI.Status]", private.wait)
            for partner, sends, receives, replaces in self._steps:
                stream.synchronize()  # MPI knows nothing of streams
                sending = comm.Isend(sent, partner, _TAG) if sends else None
                fits = True
                if receives:
                    # No message may be longer than its buffer; its length is known when it has come.
                    nbytes = wait(_Arrival(comm, partner), partner).count
                    fits = nbytes == sent.nbytes
                    if not fits:
                        needed.append(cupy.empty(nbytes, "u1"))
                    wait(comm.Irecv(receive_buffer if fits else needed[-1], partner, _TAG), partner)
                if sending is not None:
                    wait(sending, partner)
                if not fits:
                    all_fit = False
                    if marks_mismatch:
                        buffer[FAULT] = math.nan
                elif replaces:
                    buffer[...] = received
                elif receives:
                    buffer += received
        return all_fit


class _Arrival:
    """The arrival of a message, to wait for as for a request."""

    def __init__(self, comm: MPI.Comm, partner: int) -> None:
        self._comm, self._partner = comm, partner

    def Test(self, status: MPI.Status) -> bool:  # noqa: N802, mpi4py's name
        return self._comm.Iprobe(self._partner, _TAG, status)


def why_no_cupy(group: HostGroup) -> str:
    """Tell why a rank of a group cannot use CuPy, or nothing if all can (**collective**)."""
    missing, _ = missing_for_cupy()
    everyones: list[str] = group.gather_objects(missing[: SIZE // 4])
    rank = next((rank for rank, reason in enumerate(everyones) if reason), None)
    return "" if rank is None else f"rank {rank} cannot take part, as {everyones[rank]}"
