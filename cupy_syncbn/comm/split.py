"""MPI_Comm_split with an end: a thread calls it, and is left behind if a rank is lost meanwhile."""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import threading
import time
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 4
"""Of empty messages that say: this rank waits for the split no longer."""

_PERIOD = 0.01
"""Seconds between two looks for such a message; the end of the split itself is noticed at once."""

_LONGEST_GAP = 1.0
"""Seconds between two looks that count as waiting: more, and this process did not run meanwhile."""

_ROLL_CALL = 0.7
"""Seconds in which those that wait tell each other so, when the first has given up."""

_EXIT = 0.5
"""Seconds that the end of the process waits for a split that was given up."""


class Split:
    """A split of a communicator under way (**collective**).

    It is the only user of that communicator, which is of no more use when the wait has failed.
    """

    def __init__(self, comm: MPI.Comm, color: int | None, key: int) -> None:
        from mpi4py import MPI

        self._comm = cast("MPI.Intracomm", comm)
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
        thread, waited = self._thread, 0.0
        if thread is None:
            return ""
        try:
            last = time.monotonic()
            while True:
                thread.join(_PERIOD)
                others_gave_up = self._comm.Iprobe(tag=_TAG)
                if others_gave_up or waited > timeout or not thread.is_alive():
                    break
                now = time.monotonic()
                waited, last = waited + min(now - last, _LONGEST_GAP), now
            if not thread.is_alive() and not others_gave_up:
                return ""
            absent = self._absent()
            if others_gave_up and (not absent or not thread.is_alive()):
                return "came to MPI_Comm_split when another rank had given up waiting"
            until = ", until another rank gave up" if waited < timeout else ""
            seconds = round(min(waited, timeout), 1)
            return f"waited {seconds:g} s for {_in_words(absent)} in MPI_Comm_split{until}"
        finally:  # also after Ctrl-C
            if thread.is_alive():
                _leave_behind(thread)

    def _absent(self) -> list[int]:
        """Return the ranks that do not wait, and tell those that do that this one waits no longer."""
        from mpi4py import MPI

        comm, nothing, status = self._comm, np.empty(0), MPI.Status()
        absent = set(range(comm.size)) - {comm.rank}
        for rank in absent:
            with contextlib.suppress(MPI.Exception):  # of a rank that has ended
                comm.Isend(nothing, rank, _TAG)
        end = time.monotonic() + _ROLL_CALL
        while absent and time.monotonic() < end:
            if comm.Iprobe(tag=_TAG, status=status):
                comm.Recv(nothing, status.source, _TAG)
                absent.discard(status.source)
            else:
                time.sleep(1e-3)
        return sorted(absent)


def _in_words(ranks: list[int]) -> str:
    if not ranks:
        return "a rank that came too late"
    more = f" and {len(ranks) - 10} more" if len(ranks) > 10 else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:10])) + more


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
