"""Groups of some of the ranks: new_group, split_group."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cupy_syncbn.comm.errors import RankMismatchError, RemoteRankError
from cupy_syncbn.comm.groups import MPIProcessGroup, ProcessGroup, UnusableGroup, transport_name

if TYPE_CHECKING:
    from mpi4py import MPI


def _agree(group: MPIProcessGroup, request: str, error: Exception | None) -> None:
    """Raise `error`, or an error if another rank has one or another request (**collective**)."""
    digest = hashlib.sha256(request.encode()).hexdigest()
    everyones = group.gather_objects((error is not None, digest, request[:200])) if group.size > 1 else []
    if error is not None:
        raise error
    failed = [rank for rank, (has_failed, _, _) in enumerate(everyones) if has_failed]
    if failed:
        raise RemoteRankError(f"rank {failed[0]} failed before {request}: see the error there")
    for rank, (_, other_digest, other) in enumerate(everyones):
        if other_digest != digest:
            raise RankMismatchError(
                f"rank {group.rank} asks for {request}, but rank {rank} for {other}: "
                "all ranks must ask for the same"
            )


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
        If the ranks are not distinct ranks of `comm`, or the transport is unknown.
    RemoteRankError, RankMismatchError, CollectiveTimeoutError
        If another process has such an error, has other arguments, or does not come within the timeout.

    Notes
    -----
    **Collective** over `comm`: each of its processes calls it, with the same ranks. Make groups once, not in
    each step: they are never freed, and MPI has only so many communicators (MPICH 2048).
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD if comm is None else comm
    parent = MPIProcessGroup(comm, transport="mpi", timeout=timeout)
    members = list(range(comm.size))
    error: Exception | None = None
    try:
        transport = transport_name(transport)
        members = members if ranks is None else [operator.index(rank) for rank in ranks]
        if not members or len(set(members)) < len(members) or not set(members) <= set(range(comm.size)):
            raise ValueError(f"expected distinct ranks between 0 and {comm.size - 1} (got {members})")
    except TypeError:
        error = TypeError(f"expected ranks to be integers, or None for all (got {ranks!r})")
    except Exception as wrong:  # an iterable may raise any
        error = wrong
    _agree(parent, f"new_group({members}, transport={transport!r})", error)
    is_member = comm.rank in members
    part = comm.Split(0 if is_member else MPI.UNDEFINED, members.index(comm.rank) if is_member else 0)
    if not is_member:
        return UnusableGroup(f"this process is not a member of the group of ranks {members}")
    return MPIProcessGroup(part, transport=transport, timeout=timeout)


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
    from mpi4py import MPI

    comm = MPI.COMM_WORLD if comm is None else comm
    parent = MPIProcessGroup(comm, transport="mpi", timeout=timeout)
    error: Exception | None = None
    try:
        transport, group_size = transport_name(transport), operator.index(group_size)
        if group_size < 1 or comm.size % group_size:
            raise ValueError(f"expected a group_size that divides {comm.size} ranks (got {group_size})")
    except (TypeError, ValueError) as wrong:
        error = wrong
    _agree(parent, f"split_group({group_size}, transport={transport!r})", error)
    part = comm.Split(comm.rank // group_size, comm.rank)
    return MPIProcessGroup(part, transport=transport, timeout=timeout)
