"""Groups of some of the ranks: new_group, split_group."""

from __future__ import annotations

import hashlib
import operator
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.call import Call, Collective
from cupy_syncbn.comm.errors import CollectiveTimeoutError, RankMismatchError
from cupy_syncbn.comm.groups import (
    DEFAULT_TIMEOUT,
    MPIProcessGroup,
    ProcessGroup,
    UnusableGroup,
    timeout_of,
    transport_name,
    world_comm,
)
from cupy_syncbn.comm.private_comm import no_communicator
from cupy_syncbn.comm.split import Split
from cupy_syncbn.comm.transports import why_not

if TYPE_CHECKING:
    from mpi4py import MPI


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
        What carries CuPy arrays, and seconds.

    Returns
    -------
    ProcessGroup
        On a process that is not among `ranks`, each use of it raises RuntimeError.

    Raises
    ------
    TypeError, ValueError
        If the ranks are not distinct ranks of `comm`, or the transport or the timeout is wrong.
    RuntimeError
        If MPI is not running, or has no communicator left, or the transport cannot serve the group.
    RemoteRankError, RankMismatchError, CollectiveTimeoutError
        If another process has such an error, has other arguments, or does not come within the timeout.

    Notes
    -----
    **Collective** over `comm`: each of its processes calls it, with the same ranks. MPI has only so many
    communicators, MPICH 2048, and a group takes up to two. Make groups once, not in each step, and free those
    that are not needed any more, by `group.free()` or `with`. To make many groups call `split_group`, which
    makes all at once: a `new_group` for each of 500 nodes is 500 rounds of messages among all ranks.

    It takes a sum of 13 numbers and MPI_Comm_split. The first sum of the group and its choice of a transport
    take eight bytes from each of its ranks to each, 128 KB at 16,384 ranks. Of these four bytes per rank are
    kept, and none where the ranks of a node are neighbours.

    A thread calls MPI_Comm_split, so a rank that is lost in it is a CollectiveTimeoutError too. MPI cannot be
    finalized afterwards: if the thread still waits when this process ends, MPI_Abort ends all ranks. Where
    MPI does not grant MPI_THREAD_MULTIPLE, no thread can call it, and MPI waits for that rank.

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
    group = MPIProcessGroup(part, transport="mpi", timeout=timeout)
    group.owns_comm, group.transport = True, transport
    problem = why_not(group, transport)
    if problem:  # on all ranks alike
        group.free()
        raise RuntimeError(problem)
    return group


class _Request:
    """What this rank asks for, which all ranks of a communicator must ask for (**collective**).

    As a context it is what can fail on one rank alone. At the end all ranks compare their requests, so that
    each raises an error if any has one, or if they differ.
    """

    def __init__(self, text: str, comm: MPI.Intracomm | None) -> None:
        comm = world_comm() if comm is None else comm
        self.text = text
        self.timeout = DEFAULT_TIMEOUT
        self.parent = MPIProcessGroup(comm, transport="mpi", timeout=DEFAULT_TIMEOUT)
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.parent.timeout = self.timeout
        step = Collective(describe=self._describe)
        if error is not None:
            step.fail(error)  # which tells the other ranks
            return
        with step:
            step.enter(*self._describe())
            code = int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:6], "big")
            pairs = *trailer.pairs_of(code), *trailer.pairs_of(code >> trailer.TAG_BITS)
            vector = np.array([*pairs, *step.trailer()])
            step.sum(vector)  # the request is the call's name, so that others are other calls
            if not trailer.agree(vector[: trailer.FAULT].tolist(), self.parent.size):
                raise RankMismatchError(
                    f"rank {self.parent.rank} is in {self.text}, another asks for other ranks"
                )

    def _describe(self) -> tuple[Call, ProcessGroup, int, tuple[Any, ...]]:
        """Return what `Collective` needs to know."""
        return Call(self.text, 0, "", 0), self.parent, 2 * len(trailer.pairs_of(0)) + trailer.LENGTH, ()

    def split(self, color: int | None, key: int) -> MPI.Comm:
        """Return the communicator of the ranks of one color; MPI.COMM_NULL if that is None."""
        # One timeout for all, but the split has a second of its own, which it needs if the machine is slow.
        left = max(self.timeout - (time.monotonic() - self._start), min(self.timeout, 1.0))
        with self.parent.messages([]) as private:
            split = Split(private, color, key)
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
