"""The sum of a NumPy vector over ranks that may be out of step: those too get an answer, not a crash.

MPI's own allreduce demands the same length on all ranks, and some libraries crash if lengths differ. Here
each rank looks at the length of each message that arrives. Each vector ends in a trailer: of a vector of
another length it is all that counts, and a rank that has failed sends its trailer alone, a notice. So every
rank ends in the same call, and knows.

No message may be longer than its receive buffer: MPI calls that an error, but Open MPI (5.0.11, at more than
4 KiB between processes of a host) writes all of it before it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.schedules import steps
from cupy_syncbn.comm.trailer import FAULT

if TYPE_CHECKING:
    from mpi4py import MPI

LONGEST = 1 << 17
"""Numbers in a message. A longer vector is announced by a message of one number, its length, and divided."""

_TAG = 1
_TESTS = range(50)
"""Looks at whether messages have gone, which mostly they have, before a wait for them."""
_ITEM = 8  # bytes of a float64


class _Messages(NamedTuple):
    """The requests of one step, which are started anew for each sum, and the memory that they send."""

    partner: int
    requests: list[MPI.Prequest]
    """The requests that are started together."""
    incoming: MPI.Prequest | None
    outgoing: list[MPI.Prequest]
    sent: Array
    replaces: bool


def pieces(length: int) -> list[int]:
    """Return the lengths of the messages that a vector is divided into."""
    size = -(-length // -(-length // LONGEST))
    return [min(size, length - start) for start in range(0, length, size)]


def _merge(target: Array, received: Array, replaces: bool) -> None:
    if replaces:
        target[:] = received
    else:
        target += received


class CheckedSum:
    """Sums of vectors of one length, with requests and memory that every sum uses again.

    MPI is given no other memory: a sum can be given up in the middle, as long as this object lives. `notices`
    adds up trailers alone; None for that itself.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        rank: int,
        size: int,
        length: int,
        receive_buffer: Array,
        notices: CheckedSum | None,
    ) -> None:
        from mpi4py import MPI

        self._receive_buffer, self._notices = receive_buffer, notices or self
        self._length = length
        self._expected = receive_buffer[:length]
        is_long = length > LONGEST
        self._whole = -1 if is_long else self._expected.nbytes
        """Bytes of a message that has all of a vector of this length."""
        self._is_divided = False  # while the pieces of a long vector come
        self._messages: list[_Messages] = []
        self._outgoing: list[tuple[MPI.Prequest, int]] = []
        self.begun = 0
        """How many steps of it were begun; the caller sets it to 0 when it has ended."""
        for partner, sends, receives, replaces in steps(rank, size):
            incoming = comm.Recv_init(receive_buffer, partner, _TAG) if receives else None
            sent = np.empty(length)
            parts = [sent]
            if is_long:
                parts = [np.array([length], np.float64), *np.split(sent, np.cumsum(pieces(length))[:-1])]
            outgoing = [comm.Send_init(part, partner, _TAG) for part in parts if sends]
            requests = [*([] if incoming is None else [incoming]), *outgoing]
            self._messages.append(_Messages(partner, requests, incoming, outgoing, sent, replaces))
            self._outgoing += [(request, partner) for request in outgoing]
        self._start = MPI.Prequest.Startall

    def sum(self, vector: Array, wait: Callable[..., MPI.Status]) -> int:
        """Replace `vector`, float64, by its sum, and return 1, the number of sums that have ended."""
        start = self._start
        for number, message in enumerate(self._messages):
            partner, requests, incoming, outgoing, sent, replaces = message
            if outgoing:
                sent[...] = vector  # as the vector is written to before it has gone
            self.begun = start(requests) or number + 1
            if incoming is None:
                continue
            nbytes = wait(incoming, partner).count
            if nbytes != self._whole:
                self._take_other(vector, message, nbytes, wait)
            elif replaces:
                vector[...] = self._expected
            else:
                vector += self._expected
        for request, partner in self._outgoing:
            for _ in _TESTS:
                if request.Test():
                    break
            else:
                wait(request, partner, True)
        return 1

    def finish(self, notice: Array, wait: Callable[[MPI.Request, int], MPI.Status]) -> None:
        """Take the rest of a sum after an error within it, with a trailer in place of the vector."""
        if self._is_divided:
            raise RuntimeError("some messages of a long vector have come, and some have not")
        for number in range(max(self.begun - 1, 0), len(self._messages)):
            message = self._messages[number]
            if number >= self.begun:
                message = self._notices._messages[number]
                np.copyto(message.sent, notice)
                self.begun = self._start(message.requests) or number + 1
            if message.incoming is not None:  # if that has come already, there is nothing to add
                nbytes = wait(message.incoming, message.partner).count
                self._notices._take_other(notice, message, nbytes, wait)
        self._notices._leave(wait)
        self._leave(wait)

    def _take_other(
        self, vector: Array, message: _Messages, nbytes: int, wait: Callable[[MPI.Request, int], MPI.Status]
    ) -> None:
        """Add or assign a message that is not as long as the vector: a piece of it, or another's trailer."""
        if nbytes == 0:
            return
        length, count = self._length, nbytes // _ITEM
        if count == 1 and message.incoming is not None:
            self._is_divided, length, start = True, int(self._receive_buffer[0]), 0
            for count in pieces(length):
                message.incoming.Start()
                wait(message.incoming, message.partner)
                if length == self._length:
                    part, received = vector[start : start + count], self._receive_buffer[:count]
                    _merge(part, received, message.replaces)
                    start += count
            self._is_divided = False
            if length == self._length:
                return
        else:
            length = count
        ending, received = vector[FAULT:], self._receive_buffer[count - trailer.LENGTH : count]
        _merge(ending, received, message.replaces)
        if trailer.LENGTH not in (length, self._length):
            ending[0] = math.nan

    def _leave(self, wait: Callable[[MPI.Request, int], MPI.Status]) -> None:
        """Wait until all messages have gone."""
        for request, partner in self._outgoing:
            wait(request, partner)

    def has_gone(self) -> bool:
        """Tell whether all messages have gone."""
        return all(request.Test() for request, _ in self._outgoing)

    def free(self) -> None:
        """Free the requests when no sum is under way."""
        for message in self._messages:
            for request in message.requests:
                request.Free()
