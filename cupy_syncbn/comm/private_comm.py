"""The private communicator: a duplicate on which only messages of this package travel."""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Self, cast

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm.checked_sum import LONGEST, CheckedSum
from cupy_syncbn.comm.errors import CollectiveTimeoutError

if TYPE_CHECKING:
    from mpi4py import MPI

FREED = "this group was freed, or its communicator was freed: make another group, and assign it to its layers"

_NOT_INITIALIZED = (
    "MPI is not initialized, as mpi4py.rc.initialize is False: call MPI.Init() or MPI.Init_thread() before "
    "the first call that needs ranks, or leave mpi4py.rc.initialize as it is"
)

_FINALIZED = (
    "MPI is finalized, and no message can be sent any more: call MPI.Finalize() after the last use of a "
    "group, or leave it to mpi4py, which calls it when the process ends"
)

_FORKED = (
    "this process was forked from a rank, and MPI does not go on in it: leave the exchanges to the rank, or "
    "use process_group=SingleProcessGroup() here"
)

_SPINS_BEFORE_YIELD = range(50)
"""Tests of a request before the core is offered to others, such as ranks that share it."""


class PrivateComm:
    """The one duplicate of a communicator, its memory, and the wait for its messages.

    A collective operation takes it, and releases it at its end. All waits in between have one deadline.
    """

    def __init__(self, comm: MPI.Comm, rank: int, size: int) -> None:
        from mpi4py import MPI

        self.comm, self.rank, self.size = comm, rank, size
        self._unusable: tuple[type[RuntimeError], str] | None = None  # the error of each further use
        self._lock = threading.Lock()
        self._timeout = math.inf
        self._deadline: float | None = None
        self._status = MPI.Status()
        self._receive_buffer = np.empty(LONGEST)
        self._sums: dict[int, CheckedSum] = {}  # by the length of the vector
        self.users = 0
        """Groups that have opened it and are not freed: equally many on all ranks, as both are collective."""
        _private_comms.add(self)

    def take(self, timeout: float) -> Self:
        """Keep other threads out until the context ends; all waits in it have `timeout` seconds together."""
        if self._unusable:
            kind, reason = self._unusable
            raise kind(reason)
        if not self._lock.acquire(False):
            raise RuntimeError(
                "two threads of this process exchange on one communicator at a time: the other ranks cannot "
                "tell whose turn it is. Give each thread a group of its own, new_group()"
            )
        self._timeout, self._deadline = timeout, None
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def sum(self, vector: Array, timeout: float) -> None:
        """Replace a NumPy vector by its sum over the ranks, as an operation of its own; see `CheckedSum`."""
        self.take(timeout)
        try:
            checked_sum = self._sums.get(vector.size)
            if checked_sum is None:
                checked_sum = CheckedSum(self.comm, self.rank, self.size, vector.size, self._receive_buffer)
                self._sums[vector.size] = checked_sum
            checked_sum.sum(vector, self.wait)
        except BaseException as error:
            self.give_up(error)
            raise
        finally:
            self._lock.release()

    def complete(self, request: MPI.Request, *needed: Array) -> None:
        """Wait for a collective request that needs some arrays to live as long as it does."""
        try:
            self.wait(request)
        except BaseException as error:
            self.give_up(error, *needed)
            raise

    def wait(self, request: MPI.Request, partner: int | None = None) -> MPI.Status:
        """Wait until the deadline for a request to or from a rank, or to all."""
        status, test = self._status, request.Test
        for _ in _SPINS_BEFORE_YIELD:
            if test(status):
                return status
        while not test(status):
            os.sched_yield()
            now = time.monotonic()
            if self._deadline is None:
                self._deadline = now + self._timeout
            elif now > self._deadline:
                whom = "the other ranks" if partner is None else f"rank {partner}"
                raise CollectiveTimeoutError(
                    f"rank {self.rank} of {self.size} waited {self._timeout:g} s for {whom}: "
                    "a rank ended, is stuck, or did not make this call"
                )
        return status

    def give_up(self, error: BaseException, *needed: Array) -> None:
        """Use it no more, after an error in the middle of an operation that needed some arrays."""
        self._unusable = (
            CollectiveTimeoutError,
            "an earlier exchange on this communicator was given up, and its ranks are out of step: "
            + (str(error) or type(error).__name__),
        )
        _left_to_mpi.append((self, needed))

    @property
    def is_unusable(self) -> bool:
        """Whether each further use raises an error."""
        return self._unusable is not None

    def free(self) -> None:
        """Free the duplicate together with its communicator, unless MPI may still use it."""
        from mpi4py import MPI

        if not self._unusable and not MPI.Is_finalized():
            self._unusable = RuntimeError, FREED
            for checked_sum in self._sums.values():
                checked_sum.free()
            self.comm.Free()


def private_comm_of(comm: MPI.Comm, timeout: float) -> PrivateComm:
    """Return the duplicate that a communicator keeps as an attribute, made at first use (**collective**)."""
    from mpi4py import MPI

    if comm == MPI.COMM_NULL:
        raise RuntimeError(FREED)
    if _forked:
        raise RuntimeError(_FORKED)
    require_mpi()
    request = None
    with _opening:
        private = cast("PrivateComm | None", comm.Get_attr(_keyval()))
        if private is None:
            # Not Dup, which would wait for ever for a rank that never comes to its first sum.
            try:
                duplicate, request = comm.Idup()
            except MPI.Exception as error:
                raise no_communicator(error) from error
            private = PrivateComm(duplicate, comm.rank, comm.size).take(timeout)
            comm.Set_attr(_keyval(), private)
    if request is not None:
        with private:
            try:
                private.complete(request)
            except MPI.Exception as error:
                comm.Delete_attr(_keyval())  # so that the next use tries again
                raise no_communicator(error) from error
            # Messages of other lengths are errors to catch, whatever the caller's communicator does.
            private.comm.Set_errhandler(MPI.ERRORS_RETURN)
    private.users += 1
    return private


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
    if private.is_unusable:
        return
    with private.take(math.inf):  # not while another thread uses it
        private.users -= 1
        if is_made_here:
            comm.Free()  # the attribute is deleted, and the duplicate freed, before
        elif private.users == 0:
            comm.Delete_attr(_keyval())


def require_mpi() -> None:
    """Raise RuntimeError unless MPI is running: called too soon or too late, it ends the process."""
    from mpi4py import MPI

    if not MPI.Is_initialized():
        raise RuntimeError(_NOT_INITIALIZED)
    if MPI.Is_finalized():
        raise RuntimeError(_FINALIZED)


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


_opening = threading.Lock()  # two threads would make two duplicates of one communicator

_private_comms: weakref.WeakSet[PrivateComm] = weakref.WeakSet()

# The memory of operations that were given up: kept for ever, as MPI may still read and write it.
_left_to_mpi: list[tuple[PrivateComm, tuple[Array, ...]]] = []

_forked: list[bool] = []  # not empty in a process that was forked from one with MPI


def _at_finalize(comm: MPI.Comm, keyval: int, value: None) -> None:
    """Make each later use of a private communicator an error: a use of MPI would end the process."""
    for private in _private_comms:
        private._unusable = private._unusable or (RuntimeError, _FINALIZED)


def _after_fork() -> None:
    if "mpi4py.MPI" in sys.modules:
        _forked.append(True)
    for private in _private_comms:
        private._unusable = RuntimeError, _FORKED


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
