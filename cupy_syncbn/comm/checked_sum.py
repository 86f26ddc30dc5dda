"""The sum of a NumPy vector over ranks that may be out of step: those too get an answer, not a crash.

MPI's own allreduce demands the same length on all ranks, and some libraries crash if lengths differ. Here
each rank looks at the length of each message that arrives: ranks that meet with different lengths mark the
sum and go on. So every rank ends in the same call, and knows.

No message may be longer than its receive buffer: MPI calls that an error, but Open MPI (5.0.11, at more than
4 KiB between processes of a host) writes all of it before it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm.schedules import FAULT, steps

if TYPE_CHECKING:
    from mpi4py import MPI

LONGEST = 1 << 17
"""Numbers in a message: a longer one is announced by a message of one number, its length."""

_TAG = 1


class _Messages(NamedTuple):
    """The requests of one step, started anew for each sum, and the memory that they send."""

    partner: int
    incoming: MPI.Prequest | None
    outgoing: list[MPI.Prequest]
    sent: Array
    replaces: bool


class CheckedSum:
    """Sums of vectors of one length, with requests and memory that every sum uses again.

    MPI is given no other memory: a sum can be given up in the middle, as long as this object lives.
    """

    def __init__(self, comm: MPI.Comm, rank: int, size: int, length: int, receive_buffer: Array) -> None:
        self._comm, self._receive_buffer = comm, receive_buffer
        self._nbytes = length * receive_buffer.itemsize
        self._expected = receive_buffer[:length]
        self._long = receive_buffer  # of a longer vector: kept, as MPI may write to it after an error
        self._messages: list[_Messages] = []
        self._outgoing: list[tuple[MPI.Prequest, int]] = []
        for partner, sends, receives, replaces in steps(rank, size):
            incoming = comm.Recv_init(receive_buffer, partner, _TAG) if receives else None
            sent = np.empty(length)
            parts = [sent] if length <= LONGEST else [np.array([length], np.float64), sent]
            outgoing = [comm.Send_init(part, partner, _TAG) for part in parts if sends]
            self._messages.append(_Messages(partner, incoming, outgoing, sent, replaces))
            self._outgoing += [(request, partner) for request in outgoing]

    def sum(self, vector: Array, wait: Callable[[MPI.Request, int], MPI.Status]) -> None:
        """Replace `vector`, float64, by its sum; ``vector[FAULT]`` is NaN where lengths differed."""
        for partner, incoming, outgoing, sent, replaces in self._messages:
            if incoming is not None:
                incoming.Start()
            if outgoing:
                np.copyto(sent, vector)  # as the vector is written to before it has gone
                for request in outgoing:
                    request.Start()
            if incoming is None:
                continue
            received, nbytes = self._expected, wait(incoming, partner).count
            if nbytes == self._receive_buffer.itemsize:
                received = self._long = np.empty(int(self._receive_buffer[0]))
                nbytes = wait(self._comm.Irecv(received, partner, _TAG), partner).count
            if nbytes != self._nbytes:
                vector[FAULT] = math.nan
            elif replaces:
                vector[:] = received
            else:
                vector += received
        for request, partner in self._outgoing:
            if not request.Test():  # mostly it has gone
                wait(request, partner)

    def free(self) -> None:
        """Free the requests when no sum is under way."""
        for message in self._messages:
            for request in filter(None, [message.incoming, *message.outgoing]):
                request.Free()
