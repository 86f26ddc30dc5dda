"""Groups of some of the ranks: new_group, split_group."""

from __future__ import annotations

import hashlib
import math
import operator
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import numpy as np

from cupy_syncbn.comm.errors import CollectiveTimeoutError, RankMismatchError, RemoteRankError
from cupy_syncbn.comm.groups import (
    DEFAULT_TIMEOUT,
    MPIProcessGroup,
    ProcessGroup,
    UnusableGroup,
    timeout_of,
    transport_name,
)
from cupy_syncbn.comm.private_comm import no_communicator
from cupy_syncbn.comm.schedules import FAULT
from cupy_syncbn.comm.split import Split

if TYPE_CHECKING:
    from mpi4py import MPI

_PIECES = 8
"""Bytes of the digests that ranks compare: by chance two requests agree once in 2^64."""

_SHOWN = 200
"""Characters of a request that an error shows."""


def new_group(
    ranks: Iterable[int] | None = None,
    *,
    comm: MPI.Intracomm | None = None,
    transport: str | None = None,
    timeout: float | None = None,
) -> ProcessGroup:
    """Create a group of some ranks.

    Parameters
    ----------
    ranks : iterable of int, optional
        Ranks of `comm`, in the order that they have in the group; default all.
    comm : mpi4py.MPI.Intracomm, optional
        The communicator of the ranks; default MPI.COMM_WORLD.
    transport, timeout : see `MPIProcessGroup`
        The way of CuPy arrays, and seconds.

    Returns
    -------
    ProcessGroup
        On a process that is not among `ranks`, an object that says so when it is used.

    Raises
    ------
    TypeError, ValueError
        If the ranks are not distinct ranks of `comm`, or the transport or the timeout is wrong.
    RuntimeError
        If MPI is not running, or has no communicator left.
    RemoteRankError, RankMismatchError, CollectiveTimeoutError
        If another process has such an error, has other arguments, or does not come within the timeout.

    Notes
    -----
    **Collective** over `comm`: each of its processes calls it, with the same ranks. MPI has only so many
    communicators, MPICH 2048, and a group takes up to two: make groups once, not in each step, and free those
    that are not needed any more, by `group.free()` or by `with`.

    A rank that is lost in the middle, in MPI_Comm_split, is a CollectiveTimeoutError too, as a thread calls
    it. MPI cannot be finalized then: if the thread still waits when this process ends, MPI_Abort ends all
    ranks. Where MPI does not grant MPI_THREAD_MULTIPLE, no thread can call it, and MPI waits for that rank.

    Examples
    --------
    >>> with new_group([0]) as group:
    ...     group.rank, group.size
    (0, 1)
    """
    with _Request("new_group", comm) as request:
        request.timeout = timeout_of(timeout)
        transport, everyone = transport_name(transport), range(request.parent.size)
        try:
            members = list(everyone) if ranks is None else [operator.index(rank) for rank in ranks]
        except TypeError as error:
            raise TypeError(f"expected ranks to be integers, or None for all (got {ranks!r})") from error
        if not members or len(set(members)) < len(members) or not set(members) <= set(everyone):
            raise ValueError(f"expected distinct ranks between 0 and {everyone[-1]} (got {members})")
        request.text = f"new_group({members}, transport={transport!r})"
    rank = request.parent.rank
    if rank not in members:
        request.split(None, 0)
        return UnusableGroup(f"this process is not a member of the group of ranks {members}")
    part = request.split(0, members.index(rank))
    return _group_of(part, transport, request.timeout)


def split_group(
    group_size: int,
    *,
    comm: MPI.Intracomm | None = None,
    transport: str | None = None,
    timeout: float | None = None,
) -> ProcessGroup:
    """Divide the ranks into groups of `group_size` consecutive ranks and return one's own; see `new_group`.

    It raises ValueError if `group_size` does not divide the number of ranks of `comm`. **Collective** over
    `comm`.
    """
    with _Request("split_group", comm) as request:
        request.timeout = timeout_of(timeout)
        transport, group_size, size = (
            transport_name(transport),
            operator.index(group_size),
            request.parent.size,
        )
        if group_size < 1 or size % group_size:
            raise ValueError(f"expected a group_size that divides {size} ranks (got {group_size})")
        request.text = f"split_group({group_size}, transport={transport!r})"
    rank = request.parent.rank
    part = request.split(rank // group_size, rank)
    return _group_of(part, transport, request.timeout)


def _group_of(part: MPI.Comm, transport: str, timeout: float) -> MPIProcessGroup:
    """Return the group of a communicator that nobody else has."""
    group = MPIProcessGroup(part, transport=transport, timeout=timeout)
    group.owns_comm = True
    return group


class _Request:
    """What this rank asks for, which all ranks of a communicator must ask for (**collective**).

    As a context it is what can fail on one rank alone. At the end all ranks compare their requests, so that
    each raises an error if any has one, or if they differ.
    """

    def __init__(self, text: str, comm: MPI.Intracomm | None) -> None:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD if comm is None else comm
        self.text = text
        self.timeout = DEFAULT_TIMEOUT
        self.parent = MPIProcessGroup(comm, transport="mpi", timeout=DEFAULT_TIMEOUT)
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.parent.timeout = self.timeout
        if self.parent.size == 1 or not (error is None or isinstance(error, Exception)):
            return
        try:
            self._compare(error)
        except CollectiveTimeoutError as late:
            late.call = late.call or self.text
            if error is None:
                raise
            error.add_note(f"The other ranks did not hear of it: {late}")

    def split(self, color: int | None, key: int) -> MPI.Comm:
        """Return the communicator of the ranks of one color; MPI.COMM_NULL if that is None."""
        # One timeout for all, but the split has a second of its own, which it needs if the machine is slow.
        left = max(self.timeout - (time.monotonic() - self._start), min(self.timeout, 1.0))
        with self.parent.messages([]) as (comm, _):
            split = Split(comm, color, key)
            wrong = split.wait(left)
            if wrong:
                raise CollectiveTimeoutError(
                    f"rank {self.parent.rank} of {self.parent.size} {wrong}: a rank ended, is stuck, or was "
                    "late. If all ranks live, they can go on with a new communicator, "
                    "new_group(..., comm=comm.Dup())",
                    self.text,
                )
        if split.error is not None:  # MPI's, on all ranks alike: the communicator is as it was
            raise no_communicator(split.error) from split.error
        return split.part

    def _compare(self, error: Exception | None) -> None:
        """Raise an error if another rank has one, or asks for something else."""
        parent, shown = self.parent, self.text[:_SHOWN]
        digest = hashlib.sha256(self.text.encode()).digest()[:_PIECES]
        pieces = np.frombuffer(digest, np.uint8).astype(np.float64)
        # As long on any number of ranks; at the end it has the trailer of a call without a fault.
        vector = np.concatenate([[error is not None], pieces, pieces * pieces, np.zeros(-FAULT)])
        failures, *sums = parent.allreduce_checked(vector)[:FAULT].tolist()
        if math.isnan(vector[FAULT]) and error is None:
            raise RankMismatchError(
                f"rank {parent.rank} is in {shown}, while another rank is in another call: "
                "all ranks must make the same calls in the same order"
            )
        # Cauchy and Schwarz's inequality is an equality: exact in float64 for up to 2^18 ranks.
        agree = all(parent.size * sums[_PIECES + i] == sums[i] ** 2 for i in range(_PIECES))
        if math.isnan(vector[FAULT]) or (failures == 0 and agree):
            return
        everyones = parent.gather_objects((error is not None, digest, shown))  # only for the message
        failed = [rank for rank, (has_failed, _, _) in enumerate(everyones) if has_failed]
        if error is not None:
            return
        if failed:
            raise RemoteRankError(f"rank {failed[0]} failed before {shown}: see the error there")
        rank, other = next((rank, text) for rank, (_, each, text) in enumerate(everyones) if each != digest)
        raise RankMismatchError(
            f"rank {parent.rank} asks for {shown}, but rank {rank} for {other}: "
            "all ranks must ask for the same"
        )
