"""The private communicator: a duplicate on which only messages of this package travel."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.checked_sum import LONGEST, AnySum, Notices, sum_of
from cupy_syncbn.comm.clock import LONGEST_LOOK, RunningClock
from cupy_syncbn.comm.errors import CollectiveTimeoutError, RemoteRankError
from cupy_syncbn.comm.launcher import FINALIZED, initialized_mpi
from cupy_syncbn.comm.schedules import Schedule
from cupy_syncbn.comm.small_objects import number_of

if TYPE_CHECKING:
    from mpi4py import MPI

FREED = "this group was freed, or its communicator was freed: make another group, and assign it to its layers"

_FORKED = (
    "this process was forked from a rank, and MPI does not go on in it: leave the exchanges to the rank, or "
    "use process_group=SingleProcessGroup() here"
)

GO_ON = (
    "This communicator is used no more: to go on, all ranks make a group on a new one, such as "
    "new_group(comm=MPI.COMM_WORLD.Dup())"
)

_NOTICES = 0
"""The length under which sums of trailers alone are kept: no vector has it."""

_LEAVING = 3  # tag of what a rank tells its partners when it leaves its messages
_TIMED_OUT, _FAILED = 0, 1  # the reason
_BETWEEN_PROBES = 0.02
"""Seconds of waiting between two looks for such a message."""
_LONGEST_ROLL_CALL = 1.0
"""Seconds that a rank waits for such messages when it has given up itself."""

_LONGEST_FAREWELL = 0.5
"""Seconds that a rank which has its sum waits for its partners, who are in it too, to take its messages."""

_SPINS_BEFORE_YIELD = range(50)
"""Tests of a request before the core is offered to others, such as ranks that share it."""


class PrivateComm:
    """The one duplicate of a communicator, its memory, and the wait for its messages.

    A collective operation takes it, and releases it at its end. All waits in between have one timeout. MPI is
    lent only memory that outlives an operation which was given up.
    """

    comm: MPI.Comm
    schedule: Schedule
    """Known when it is open."""
    _receive_buffer: Array

    def __init__(self, rank: int, size: int) -> None:
        from mpi4py import MPI

        self.rank, self.size = rank, size
        self.models = 0
        """How many models have been wrapped for these ranks."""
        self.sums = 0
        """How many checked sums have ended, whether by a result or an error of which all ranks heard."""
        self._unusable: tuple[type[RuntimeError], str] | None = None  # the error of each further use
        self._lock = threading.RLock()  # an error in its release must not keep out this thread
        self._timeout = math.inf
        self._waited = 0.0
        self._status = MPI.Status()
        self._opening: Any = None  # the request, once there is one
        self._placing: Any = None  # that for the nodes
        self._is_open = False
        self._notice = np.zeros(trailer.LENGTH)
        self._sums: dict[int, AnySum] = {}  # by the length of the vector
        self._late: list[AnySum] = []  # whose messages a partner had not taken when they were used last
        self.users = 0
        """Groups that have opened it and are not freed: equally many on all ranks, as both are collective."""
        _private_comms.add(self)

    def open(self, comm: MPI.Comm, timeout: float, host: str) -> None:
        """Make the duplicate, or go on where an error has ended an earlier attempt (**collective**).

        The ranks tell each other the names of their hosts, as numbers of eight bytes.
        """
        from mpi4py import MPI

        with self.take(timeout):
            if self._opening is None:
                self._host, self._hosts = np.array([number_of(host)]), np.empty(self.size, np.int64)
                # Not Dup, which would wait for ever for a rank that never comes to its first sum.
                self.comm, self._opening = comm.Idup()
            try:
                self.wait(self._opening)
                if self._placing is None:
                    self._placing = self.comm.Iallgather(self._host, self._hosts)
                self.wait(self._placing)
                self.schedule = Schedule(self._hosts)
            except BaseException as error:
                if _ends_all(error):  # after another one it can be gone on with
                    self.leave(error)
                raise
            # Messages of other lengths are errors to catch, whatever the caller's communicator does.
            self.comm.Set_errhandler(MPI.ERRORS_RETURN)
            try:
                self._receive_buffer = np.empty(LONGEST)
            except MemoryError as error:  # without it no sum can be taken part in: the other ranks are told
                self._is_open = True
                self.leave(error)
                raise
            self._sum_of(_NOTICES)
            self._is_open = True
            del self._hosts

    @property
    def is_open(self) -> bool:
        """Whether the duplicate is there."""
        return self._is_open

    def take(self, timeout: float) -> Self:
        """Keep other threads out until the context ends; all waits in it have `timeout` seconds together."""
        if self._unusable or not self._lock.acquire(False):
            self._refuse()
        self._timeout, self._waited = timeout, 0.0
        return self

    def _refuse(self) -> NoReturn:
        if self._unusable:
            kind, reason = self._unusable
            raise kind(reason)
        raise RuntimeError(
            "two threads of this process exchange on one communicator at a time: the other ranks cannot "
            "tell whose turn it is. Give each thread a group of its own, new_group()"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def sum(self, vector: Array, timeout: float, kind: int | None = None) -> None:
        """Replace a NumPy vector by its sum over the ranks, as an operation of its own; see `checked_sum`.

        After an error here the other ranks are told, unless that would have to wait.
        """
        if self._unusable or not self._lock.acquire(False):  # as `take`, in one call less
            self._refuse()
        checked_sum = None
        try:
            self._timeout, self._waited = timeout, 0.0
            length = vector.size if kind is None else kind
            checked_sum = self._sums.get(length) or self._sum_of(length)
            self.sums, checked_sum.begun = self.sums + checked_sum.sum(vector, self.wait), 0
        except BaseException as error:
            if checked_sum is None:
                raise  # nothing has been sent
            self._finish(checked_sum, vector, error)
            raise
        finally:
            self._lock.release()

    def _sum_of(self, length: int) -> AnySum:
        messages = self.comm, self.rank, self.schedule, self._receive_buffer
        if length == _NOTICES:
            self._sums[length] = Notices(*messages)
        else:
            self._sums[length] = sum_of(length, *messages, self._notices())
        return self._sums[length]

    def _notices(self) -> Notices:
        return cast("Notices", self._sums.get(_NOTICES) or self._sum_of(_NOTICES))

    def _finish(self, checked_sum: AnySum, vector: Array, error: BaseException) -> None:
        """After an error in the middle of a sum, end it with a fault flag, or give up."""
        if _ends_all(error):
            self.leave(error)
            return
        try:
            self._notice[:] = vector[trailer.FAULT :]
            self._notice[trailer.FAULT] = trailer.fault_code(self.rank, self.size)
            checked_sum.finish(self._notices(), self._notice, self.wait)
            self.sums, checked_sum.begun = self.sums + 1, 0
        except BaseException as late:
            self.leave(late)

    def tell(self, ending: tuple[float, ...], timeout: float) -> Array:
        """Take part in a sum of any length with the trailer of a fault alone; return its sum."""
        self._notice[:] = ending
        self.sum(self._notice, timeout, _NOTICES)
        return self._notice

    def complete(self, request: MPI.Request, *needed: Any) -> None:
        """Wait for a collective request that needs some arrays to live as long as it does."""
        try:
            self.wait(request)
        except BaseException as error:
            self.leave(error, *needed)
            raise

    def wait(self, request: MPI.Request, partner: int | None = None, is_last: bool = False) -> MPI.Status:
        """Wait until the timeout for a request to or from a rank, or to all.

        `is_last` is for the messages that a rank has sent, when it needs nothing more: a partner that was
        stopped may take them later.
        """
        status, test = self._status, request.Test
        for _ in _SPINS_BEFORE_YIELD:
            if test(status):
                return status
        # As `RunningClock`, without its calls: time counts in which this process ran and looked.
        last, next_probe = time.monotonic(), self._waited + _BETWEEN_PROBES
        limit = min(self._timeout, self._waited + _LONGEST_FAREWELL) if is_last else self._timeout
        while not test(status):
            os.sched_yield()
            now = time.monotonic()
            self._waited += min(now - last, LONGEST_LOOK)
            last = now
            if self._waited > limit:
                if test(status):  # its message may have come while this process was stopped
                    return status
                if is_last:
                    self._leave_messages()
                    return status
                raise self._timed_out(partner)
            if self._waited > next_probe:
                next_probe = self._waited + _BETWEEN_PROBES
                if self._is_open and self.another_leaves():
                    if test(status):
                        return status
                    raise self._given_up_by_another(partner)
        return status

    def _leave_messages(self) -> None:
        """Leave to MPI what the sums so far have sent; later ones have requests and memory of their own."""
        left, self._late = [*self._late, *self._sums.values()], []
        self._sums.clear()
        for checked_sum in left:
            if checked_sum.has_gone():
                checked_sum.free()
            else:
                self._late.append(checked_sum)

    def _given_up_by_another(self, partner: int | None) -> RuntimeError:
        """Return the error of a rank that waits, where another has left its messages."""
        reason, origin, waiting = self._hear()
        if reason == _FAILED:
            self._tell_partners(_FAILED, origin)
            return RemoteRankError(f"rank {origin} failed in the middle: see the error there. {GO_ON}")
        return self._timed_out(partner, waiting)

    def _timed_out(self, partner: int | None, waiting: int = 0) -> CollectiveTimeoutError:
        """Return the error of a rank that gives up waiting, with the ranks that do not wait as well."""
        waits = f"rank {self.rank} of {self.size} waited {self._waited:.3g} s"
        if self._waited < self._timeout:
            waits = (
                f"rank {self.rank} of {self.size} waited {self._waited:.1f} s, and another rank to its end,"
            )
        if not self._is_open:
            whom = "the other ranks" if partner is None else f"rank {partner}"
        elif missing := self.missing_ranks(waiting):
            whom = trailer.describe_ranks(missing)
        else:
            return CollectiveTimeoutError(
                f"{waits} in vain, and all other ranks have given up too: they were in different calls, "
                f"or one came too late. {GO_ON}"
            )
        return CollectiveTimeoutError(
            f"{waits} for {whom}: a rank ended, is stuck, or did not make this call. {GO_ON}"
        )

    def another_leaves(self) -> bool:
        """Tell whether another rank has left its messages, and said so."""
        return self.comm.Iprobe(_any_source(), _LEAVING)

    def missing_ranks(self, waiting: int = 0) -> list[int]:
        """Tell that this rank gives up, and return those for which some rank waits and which say nothing.

        `waiting` has a bit for each rank that has given up, as far as this one knows. It passes on what it
        hears, and a rank that still waits gives up as well.
        """
        told, waiting = 0, waiting | 1 << self.rank
        clock, patience = RunningClock(), min(self._timeout / 2, _LONGEST_ROLL_CALL)
        while waiting.bit_count() < self.size and clock.look() < patience:
            if self.another_leaves():
                waiting |= self._hear()[2]
            elif told != waiting:
                self._tell_partners(_TIMED_OUT, self.rank, waiting)
                told = waiting
            else:
                time.sleep(1e-3)
        if told != waiting:
            self._tell_partners(_TIMED_OUT, self.rank, waiting)
        silent = {
            partner
            for rank in range(self.size)
            if waiting >> rank & 1
            for partner in self.schedule.partners(rank)
            if not waiting >> partner & 1
        }
        return sorted(silent)

    def _tell_partners(self, reason: int, origin: int, waiting: int = 0) -> None:
        """Tell the ranks that this one has messages with why it leaves them; they pass it on.

        Not all ranks: Open MPI waits for a connection, if it has none to a rank, perhaps for ever.
        """
        from mpi4py import MPI

        bits = waiting.to_bytes(-(-self.size // 64) * 8, sys.byteorder)
        message = np.concatenate([[reason, origin], np.frombuffer(bits, np.int64)])
        for partner in self.schedule.partners(self.rank):
            with contextlib.suppress(MPI.Exception):  # of a rank that MPI knows to be dead
                request = self.comm.Isend(message, partner, _LEAVING)
                _left_to_mpi.append((self, (request, message)))

    def _hear(self) -> tuple[int, int, int]:
        """Receive why a partner leaves its messages, and which ranks have given up."""
        message = np.empty(2 + -(-self.size // 64), np.int64)
        self.comm.Recv(message, _any_source(), _LEAVING)
        reason, origin, *_ = message.tolist()
        return reason, origin, int.from_bytes(message[2:].tobytes(), sys.byteorder)

    @property
    def is_given_up(self) -> bool:
        """Whether it is used no more."""
        return self._unusable is not None

    def leave(self, error: BaseException, *needed: Any) -> None:
        """Give up after an error in the middle of messages, which need some arrays to live on.

        The other ranks, which wait in them, are told, and raise RemoteRankError.
        """
        if self._unusable is not None:
            return
        # All know of these; and before it is open, its duplicate takes no message.
        if self._is_open and not isinstance(error, CollectiveTimeoutError | RemoteRankError):
            self._tell_partners(_FAILED, self.rank)
        reason = str(error) or type(error).__name__
        self._unusable = (
            CollectiveTimeoutError,
            "an earlier exchange on this communicator was given up, and its ranks are out of step: "
            + (reason if GO_ON in reason else f"{reason}. {GO_ON}"),
        )
        _left_to_mpi.append((self, needed))

    def free(self) -> None:
        """Free the duplicate together with its communicator, unless MPI may still use it."""
        from mpi4py import MPI

        if self._is_open and not self._unusable and not MPI.Is_finalized():
            self._unusable = RuntimeError, FREED
            for checked_sum in self._sums.values():
                checked_sum.free()
            if self._late:
                _left_to_mpi.append((self, tuple(self._late)))
            self.comm.Free()


def private_comm_of(comm: MPI.Comm, timeout: float, host: str) -> PrivateComm:
    """Return the duplicate that a communicator keeps as an attribute, made at first use (**collective**).

    Ranks with the same name of their `host` are on one node.
    """
    from mpi4py import MPI

    if comm == MPI.COMM_NULL:
        raise RuntimeError(FREED)
    if _forked:
        raise RuntimeError(_FORKED)
    initialized_mpi()
    with _opening:
        private = cast("PrivateComm | None", comm.Get_attr(_keyval()))
        if private is None:
            private = PrivateComm(comm.rank, comm.size)
            comm.Set_attr(_keyval(), private)
    if not private.is_open:
        try:
            private.open(comm, timeout, host)
        except MPI.Exception as error:
            comm.Delete_attr(_keyval())  # so that the next use tries again
            raise no_communicator(error) from error
    private.users += 1
    return private


def known_private_comm(comm: MPI.Comm) -> PrivateComm | None:
    """Return the duplicate that a communicator keeps, open or not, if MPI can still be asked for it."""
    from mpi4py import MPI

    if MPI.Is_finalized() or _forked or comm == MPI.COMM_NULL:
        return None
    return cast("PrivateComm | None", comm.Get_attr(_keyval()))


def _ends_all(error: BaseException) -> bool:
    """Tell whether an error leaves no way to go on: a timeout, an interrupt, an error of MPI."""
    from mpi4py import MPI

    left = CollectiveTimeoutError | RemoteRankError | MPI.Exception
    return not isinstance(error, Exception) or isinstance(error, left)


@functools.cache
def _any_source() -> int:
    from mpi4py import MPI

    return MPI.ANY_SOURCE


def free_comm(comm: MPI.Comm, private: PrivateComm | None, is_made_here: bool) -> None:
    """Free a communicator that the package made, or only its duplicate if nobody else uses it.

    Nothing is freed that MPI may still use, nor where MPI has ended or is another process's. **Collective**.
    """
    from mpi4py import MPI

    if MPI.Is_finalized() or _forked or comm == MPI.COMM_NULL:
        return
    if private is None:
        if is_made_here:
            comm.Free()
        return
    if private.is_given_up:
        return
    with private.take(math.inf):  # not while another thread uses it
        private.users -= 1
        if is_made_here:
            comm.Free()  # the attribute is deleted, and the duplicate freed, before
        elif private.users == 0:
            comm.Delete_attr(_keyval())


def no_communicator(error: Exception) -> RuntimeError:
    """Return the error of a communicator that MPI did not make."""
    reason = (str(error) or type(error).__name__).splitlines()[-1]
    return RuntimeError(
        f"MPI could not make a communicator ({reason}). Perhaps there are too many, as "
        "MPICH has 2048 and Open MPI 65536, and a group takes up to two: make groups once, not in each step, "
        "and free those that are not needed any more, by group.free()"
    )


@functools.cache
def _keyval() -> int:
    """Return the key of the attribute in which a communicator keeps its duplicate."""
    from mpi4py import MPI

    # MPI deletes the attributes of this communicator at the start of MPI_Finalize, before all else.
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_at_finalize), None)
    return MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, private: private.free())


_opening = threading.RLock()  # two threads would make two duplicates of one communicator

_private_comms: weakref.WeakSet[PrivateComm] = weakref.WeakSet()

# The memory of operations that were given up: kept for ever, as MPI may still read and write it.
_left_to_mpi: list[tuple[PrivateComm, tuple[Any, ...]]] = []

_forked: list[bool] = []  # not empty in a process that was forked from one with MPI


def _at_finalize(comm: MPI.Comm, keyval: int, value: None) -> None:
    """Make each later use of a private communicator an error: a use of MPI would end the process."""
    for private in _private_comms:
        private._unusable = private._unusable or (RuntimeError, FINALIZED)


def _after_fork() -> None:
    if "mpi4py.MPI" in sys.modules:
        _forked.append(True)
    for private in _private_comms:
        private._unusable = RuntimeError, _FORKED


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
