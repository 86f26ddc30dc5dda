"""MPI_Comm_split with an end: a thread calls it, and is left behind if a rank is lost meanwhile."""

from __future__ import annotations

import atexit
import functools
import sys
import threading
import time
from typing import TYPE_CHECKING, cast

from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.clock import RunningClock
from cupy_syncbn.comm.private_comm import PrivateComm

if TYPE_CHECKING:
    from mpi4py import MPI

_PERIOD = 0.01
"""Seconds between two looks at the other ranks; the end of the split itself is noticed at once."""

_EXIT = 0.5
"""Seconds that the end of the process waits for a split that was given up."""


class Split:
    """A split of a communicator under way (**collective**).

    It is the only user of that communicator, which is of no more use when the wait has failed.
    """

    def __init__(self, private: PrivateComm, color: int | None, key: int) -> None:
        from mpi4py import MPI

        self._private, self._comm = private, cast("MPI.Intracomm", private.comm)
        self._color, self._key = MPI.UNDEFINED if color is None else color, key
        self.part: MPI.Comm = MPI.COMM_NULL
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:  # no other thread may call MPI beside this one
            self._split()
            return
        self._thread = threading.Thread(target=self._split, name="cupy_syncbn MPI_Comm_split", daemon=True)
        self._thread.start()

    def _split(self) -> None:
        try:
            self.part = self._comm.Split(self._color, self._key)
        except Exception as error:
            self.error = error

    def wait(self, timeout: float) -> str:
        """Wait until it has ended, some seconds at most; return what went wrong, in words, or nothing.

        It goes wrong also where another rank has waited for longer, as its group will not be used then.
        """
        thread, private, clock = self._thread, self._private, RunningClock()
        if thread is None:
            return ""
        try:
            while True:
                thread.join(_PERIOD)
                others_gave_up = private.another_leaves()
                if others_gave_up or clock.look() > timeout or not thread.is_alive():
                    break
            if not thread.is_alive() and not others_gave_up:
                return ""
            missing = private.missing_ranks()
            if others_gave_up and (not missing or not thread.is_alive()):
                return "came to MPI_Comm_split when another rank had given up waiting"
            until = ", until another rank gave up" if clock.seconds < timeout else ""
            seconds = round(min(clock.seconds, timeout), 1)
            whom = trailer.describe_ranks(missing) or "a rank that came too late"
            return f"waited {seconds:g} s for {whom} in MPI_Comm_split{until}"
        finally:  # also after Ctrl-C
            if thread.is_alive():
                _leave_behind(thread)


_left_behind: list[threading.Thread] = []


def _leave_behind(thread: threading.Thread) -> None:
    """Remember a thread in which MPI waits: MPI_Finalize would wait with it, perhaps for ever."""
    _left_behind.append(thread)
    _watch_the_end()


@functools.cache
def _watch_the_end() -> None:
    """Let MPI_Abort take the place of MPI_Finalize, called by the program or at the end of Python."""
    from mpi4py import MPI

    atexit.register(_abort_at_exit)
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_abort_in_finalize), None)


def _abort_at_exit() -> None:
    from mpi4py.run import set_abort_status

    if _cannot_finalize():
        set_abort_status(1)  # heeded by mpi4py after all other functions of atexit


def _abort_in_finalize(comm: MPI.Comm, keyval: int, value: None) -> None:
    from mpi4py import MPI

    if _cannot_finalize():
        MPI.COMM_WORLD.Abort(1)


def _cannot_finalize() -> bool:
    """Tell, also the user, whether a thread still waits in MPI."""
    end = time.monotonic() + _EXIT
    for thread in _left_behind:
        thread.join(max(0.0, end - time.monotonic()))
    is_stuck = any(thread.is_alive() for thread in _left_behind)
    if is_stuck:
        print(
            "cupy_syncbn: MPI_Abort ends all ranks, as MPI cannot be finalized: new_group or split_group was "
            "given up in the middle, and MPI still waits there",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return is_stuck
