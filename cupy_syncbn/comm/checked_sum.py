"""The sum of a NumPy vector over ranks that may be out of step: those too get an answer, not a crash.

MPI's own allreduce demands the same length on all ranks, and some libraries crash if lengths differ. Here
each message tells the length of the whole vector that its sender adds up, and each rank looks at it. There
are three kinds, told apart by their sizes:

    vector    float64 numbers, which end in the trailer; so long a one as no message holds is announced by its
              length, alone, and comes in pieces
    slice     a part of a vector, and four bytes: the whole one's length; only of sums without a fault so far
    notice    a trailer, and five bytes: the length of the others' vectors as far as the sender knows, and 0;
              from a rank that has failed, or knows of lengths that differ and has nothing else to send

Of a vector of another length only the trailer counts. So every rank ends in the same call, and knows.

No message may be longer than its receive buffer: MPI calls that an error, but Open MPI (5.0.11, at more than
4 KiB between processes of a host) writes all of it before it says so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.schedules import WHOLE, Schedule, Step
from cupy_syncbn.comm.trailer import FAULT

if TYPE_CHECKING:
    from mpi4py import MPI

LONGEST = 1 << 17
"""Numbers in a message. A longer vector is announced by a message of one number, its length, and divided."""

_TAG = 1
_TESTS = range(50)
"""Looks at whether messages have gone, which mostly they have, before a wait for them."""
_ITEM = 8  # bytes of a float64
_IN_SLICE, _IN_NOTICE = 4, 5
"""Bytes behind the numbers, the first four a uint32: other lengths than these have no such messages."""


class _Message(NamedTuple):
    """The requests of one step, which are started anew for each sum, and their memory."""

    partner: int
    requests: list[MPI.Prequest]
    """The requests that are started together."""
    incoming: MPI.Prequest | None
    outgoing: list[MPI.Prequest]
    sent: Array
    """The numbers that it sends."""
    sent_length: Array
    """The length that it tells behind them, if it does."""
    replaces: bool


class _Part(NamedTuple):
    """What a step of slices is about."""

    sends: slice
    receives: slice
    received: Array
    nbytes: int
    """Bytes of the message that is expected."""
    length: Array | None
    """The length that it tells, where that has to be looked at."""


def pieces(length: int) -> list[int]:
    """Return the lengths of the messages that a vector is divided into."""
    size = -(-length // -(-length // LONGEST))
    return [min(size, length - start) for start in range(0, length, size)]


def _merge(target: Array, received: Array, replaces: bool) -> None:
    if replaces:
        target[:] = received
    else:
        target += received


class AnySum(ABC):
    """The messages of a sum of one kind, with requests and memory that every sum uses again.

    MPI is given no other memory: a sum can be given up in the middle, as long as this object lives.
    """

    def __init__(self, comm: MPI.Comm, receive_buffer: Array, length: int) -> None:
        from mpi4py import MPI

        self._comm, self._receive_buffer = comm, receive_buffer
        self._tails = receive_buffer.view(np.uint32)
        self._receive_bytes = receive_buffer.view(np.uint8)
        self._length = length
        """Of the vectors that are added up, as far as this rank knows; 0 if it does not."""
        self._is_divided = False  # while the pieces of a long vector come
        self._messages: list[_Message] = []
        self._outgoing: list[tuple[MPI.Prequest, int]] = []
        self.begun = 0
        """How many steps of it were begun; the caller sets it to 0 when it has ended."""
        self._start = MPI.Prequest.Startall

    @abstractmethod
    def sum(self, vector: Array, wait: Callable[..., MPI.Status]) -> int:
        """Replace `vector`, float64, by its sum, and return 1, the number of sums that have ended."""

    def finish(self, notices: Notices, notice: Array, wait: Callable[..., MPI.Status]) -> None:
        """Take the rest of a sum after an error within it, with a trailer in place of the vector."""
        if self._is_divided:
            raise RuntimeError("some messages of a long vector have come, and some have not")
        if self.begun:
            message = self._messages[self.begun - 1]
            if message.incoming is not None:  # if that has come already, there is nothing to add
                nbytes = wait(message.incoming, message.partner).count
                self._take_other(notice, message, nbytes, wait)
        notices.relay(self.begun, notice, self._length, wait)
        self._see_off(wait)

    def _add(self, step: Step, count: int, tail: int = 0, is_long: bool = False) -> None:
        """Add a step in which this rank sends some numbers, and some bytes behind them."""
        comm, partner = self._comm, step.partner
        incoming = None if step.receives is None else comm.Recv_init(self._receive_bytes, partner, _TAG)
        count = 0 if step.sends is None else count
        memory = np.zeros(count + (tail > 0))
        sent, sent_length = memory[:count], memory[count:].view(np.uint32)
        outgoing = []
        if step.sends is not None:
            parts = [memory.view(np.uint8)[: _ITEM * count + tail]]
            if is_long:
                ends = _ITEM * np.cumsum(pieces(count))
                parts = [np.array([count], np.float64).view(np.uint8), *np.split(parts[0], ends[:-1])]
            outgoing = [comm.Send_init(part, partner, _TAG) for part in parts]
        requests = [*([] if incoming is None else [incoming]), *outgoing]
        self._messages.append(
            _Message(partner, requests, incoming, outgoing, sent, sent_length, step.replaces)
        )
        self._outgoing += [(request, partner) for request in outgoing]

    def _take_other(
        self, vector: Array, message: _Message, nbytes: int, wait: Callable[..., MPI.Status]
    ) -> None:
        """Add or assign a message that has no more for this rank than a trailer, or is a vector in pieces.

        If the length that it tells is another one, the fault flag becomes NaN.
        """
        if nbytes == 0:
            return
        count, rest = divmod(nbytes, _ITEM)
        length = count
        if rest:
            length = int(self._tails[2 * count])
        elif count == 1 and message.incoming is not None:
            self._is_divided, length, start = True, int(self._receive_buffer[0]), 0
            for count in pieces(length):
                message.incoming.Start()
                wait(message.incoming, message.partner)
                if length == vector.size:
                    part, received = vector[start : start + count], self._receive_buffer[:count]
                    _merge(part, received, message.replaces)
                    start += count
            self._is_divided = False
            if length == vector.size:
                return
        ending = vector[FAULT:]
        if rest != _IN_SLICE:
            _merge(ending, self._receive_buffer[count - trailer.LENGTH : count], message.replaces)
        self._length = self._length or length
        if length not in (0, self._length):
            ending[0] = math.nan

    def _see_off(self, wait: Callable[..., MPI.Status], is_last: bool = False) -> None:
        """Wait until all messages have gone."""
        for request, partner in self._outgoing:
            for _ in _TESTS:
                if request.Test():
                    break
            else:
                wait(request, partner, is_last)

    def has_gone(self) -> bool:
        """Tell whether all messages have gone."""
        return all(request.Test() for request, _ in self._outgoing)

    def free(self) -> None:
        """Free the requests when no sum is under way."""
        for message in self._messages:
            for request in message.requests:
                request.Free()


class Notices(AnySum):
    """The part in a sum of a rank that has only a trailer to tell; it needs no memory that is not there."""

    def __init__(self, comm: MPI.Comm, rank: int, schedule: Schedule, receive_buffer: Array) -> None:
        super().__init__(comm, receive_buffer, 0)
        for step in schedule.steps(rank):
            self._add(step, trailer.LENGTH, _IN_NOTICE)

    def sum(self, vector: Array, wait: Callable[..., MPI.Status]) -> int:
        self.relay(0, vector, 0, wait, True)
        return 1

    def relay(
        self, first: int, notice: Array, length: int, wait: Callable[..., MPI.Status], is_last: bool = False
    ) -> None:
        """Take the steps of a sum from one on, for a rank whose vector has some length, 0 if it has none."""
        self._length = length
        for number in range(first, len(self._messages)):
            message = self._messages[number]
            if message.outgoing:
                message.sent[:] = notice
                message.sent_length[0] = self._length
            self.begun = self._start(message.requests) or number + 1
            if message.incoming is not None:
                nbytes = wait(message.incoming, message.partner).count
                self._take_other(notice, message, nbytes, wait)
        self._see_off(wait, is_last)
        self.begun = 0


class CheckedSum(AnySum):
    """Sums of vectors of one length, by messages of whole vectors."""

    def __init__(
        self, comm: MPI.Comm, rank: int, schedule: Schedule, length: int, receive_buffer: Array
    ) -> None:
        super().__init__(comm, receive_buffer, length)
        self._expected = receive_buffer[:length]
        is_long = length > LONGEST
        self._whole = -1 if is_long else self._expected.nbytes
        """Bytes of a message that has all of a vector of this length."""
        for step in schedule.steps(rank):
            self._add(step, length, is_long=is_long)

    def sum(self, vector: Array, wait: Callable[..., MPI.Status]) -> int:
        start = self._start
        for number, message in enumerate(self._messages):
            partner, requests, incoming, outgoing, sent, _, replaces = message
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
        self._see_off(wait, True)
        return 1


class SlicedSum(AnySum):
    """Sums of vectors of one length by messages of slices, the lanes of `schedules`.

    A rank that meets anything but the slice that is due goes on with notices: so when the steps have ended in
    which ranks hear of each other, all know, and none waits for a slice of the sum.
    """

    def __init__(
        self, comm: MPI.Comm, steps: list[Step], length: int, receive_buffer: Array, notices: Notices
    ) -> None:
        super().__init__(comm, receive_buffer, length)
        self._notices = notices
        self._parts: list[_Part] = []
        numbers = range(length)
        for step in steps:
            sends, receives = step.sends or WHOLE, step.receives or WHOLE
            count, due = len(numbers[sends]), len(numbers[receives])
            tail = _IN_SLICE if step.is_slice else 0
            self._add(step, count, tail)
            self._messages[-1].sent_length[:1] = length
            told = self._tails[2 * due : 2 * due + 1] if step.is_slice and not step.replaces else None
            self._parts.append(_Part(sends, receives, receive_buffer[:due], _ITEM * due + tail, told))
        self._told = next((number for number, step in enumerate(steps) if step.is_slice), len(steps))
        """How many steps can have begun before a notice is too late for some ranks."""

    def sum(self, vector: Array, wait: Callable[..., MPI.Status]) -> int:
        start, length = self._start, self._length
        for number, (message, part) in enumerate(zip(self._messages, self._parts, strict=True)):
            partner, requests, incoming, outgoing, sent, _, replaces = message
            sends, receives, received, due, told = part
            if outgoing:
                sent[...] = vector[sends]
            self.begun = start(requests) or number + 1
            if incoming is None:
                continue
            nbytes = wait(incoming, partner).count
            if nbytes != due or (told is not None and told[0] != length):
                notice = vector[FAULT:]
                notice[:] = 0
                self._take_other(notice, message, nbytes, wait)
                self._notices.relay(number + 1, notice, length, wait, True)
                break
            target = vector[receives]
            if replaces:
                target[...] = received
            else:
                target += received
        self._see_off(wait, True)
        return 1

    def finish(self, notices: Notices, notice: Array, wait: Callable[..., MPI.Status]) -> None:
        if self.begun > self._told:  # ranks that a notice does not reach any more would wait for slices
            raise RuntimeError("some slices have gone, and some have not")
        super().finish(notices, notice, wait)


def sum_of(
    length: int, comm: MPI.Comm, rank: int, schedule: Schedule, receive_buffer: Array, notices: Notices
) -> AnySum:
    """Return the sum of vectors of one length, by the schedule that is the fastest for it."""
    halvings = schedule.halvings(_ITEM * length) if length <= LONGEST else 0
    if not halvings:
        return CheckedSum(comm, rank, schedule, length, receive_buffer)
    steps = list(schedule.steps(rank, length, halvings))
    return SlicedSum(comm, steps, length, receive_buffer, notices)
