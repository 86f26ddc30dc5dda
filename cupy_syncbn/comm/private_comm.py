"""The private communicator: the duplicate of a communicator that messages travel on."""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Self

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm.checked_sum import LONGEST, CheckedSum
from cupy_syncbn.comm.errors import CollectiveTimeoutError

if TYPE_CHECKING:
    from mpi4py import MPI

SPINS_BEFORE_YIELD = range(50)
"""Tests of a request before the core is offered to others, such as ranks that share it."""


class PrivateComm:
    """The one duplicate of a communicator, and what MPI uses for its messages; the context of an exchange."""

    def __init__(self, comm: MPI.Comm) -> None:
        from mpi4py import MPI

        self.comm = comm
        self.status = MPI.Status()
        self.place = np.empty(LONGEST)
        self.exchanges: dict[int, CheckedSum] = {}
        """By the length of the vector."""
        self.unusable: tuple[type[RuntimeError], str] | None = None
        """The error that tells why no more messages can travel here, if so."""
        self.lock = threading.Lock()
        _private_comms.add(self)

    def take(self) -> None:
        """Keep other threads out, until the lock is released."""
        if not self.lock.acquire(False):
            raise RuntimeError(
                "two threads of this process exchange on one communicator at a time: the other ranks cannot "
                "tell whose turn it is. Give each thread a group of its own, new_group()"
            )

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.lock.release()

    def give_up(self, error: BaseException, *needed: Array) -> None:
        """Use the channel no more, after an error in the middle of an exchange that needed some arrays."""
        self.unusable = (
            CollectiveTimeoutError,
            "an earlier exchange on this communicator was given up, and its ranks are out of step: "
            + (str(error) or type(error).__name__),
        )
        _left_to_mpi.append((self, needed))

    def free(self) -> None:
        """Free the duplicate with the communicator that it is of, unless MPI may still use it."""
        from mpi4py import MPI

        if not self.unusable and not MPI.Is_finalized():
            self.unusable = RuntimeError, FREED
            for exchange in self.exchanges.values():
                exchange.free()
            self.comm.Free()


opening = threading.Lock()
"""Held while a communicator gets its channel."""
_private_comms: weakref.WeakSet[PrivateComm] = weakref.WeakSet()
_left_to_mpi: list[tuple[PrivateComm, tuple[Array, ...]]] = []
"""What exchanges needed that were given up: kept for ever, as MPI may still read and write it."""

FREED = "the communicator of this group was freed: make another group, and assign it to its layers"
FORKED = (
    "this process was forked from a rank, and MPI does not go on in it: leave the exchanges to the rank, or "
    "use process_group=SingleProcessGroup() here"
)
forked: list[bool] = []
"""Not empty in a process that was forked from one with MPI."""


def _after_fork() -> None:
    """Keep a child from using what belongs to its parent."""
    if "mpi4py.MPI" in sys.modules:
        forked.append(True)
    for channel in _private_comms:
        channel.unusable = RuntimeError, FORKED


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def keyval_for(purpose: str) -> int:
    """Key of an attribute in which a communicator keeps what belongs to it: its channel, its group."""
    from mpi4py import MPI

    def freed(comm: MPI.Comm, keyval: int, value: object) -> None:
        if isinstance(value, PrivateComm):
            value.free()

    return MPI.Comm.Create_keyval(delete_fn=freed)
