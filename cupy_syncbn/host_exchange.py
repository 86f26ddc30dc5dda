"""The sum of a vector over ranks that may be out of step: those too must get an answer, not a crash.

MPI's own allreduce demands that all ranks bring the same length, and some libraries crash if they do not.
Here the length of each message is looked at when it arrives: ranks that meet with different lengths mark the
sum and go on, and so every rank ends in the same call, and knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

    Array = np.ndarray[Any, Any]

FAULT = -3
"""Where a vector has its fault flag; NaN there tells that lengths differed."""

_TAG = 1


class Step(NamedTuple):
    """What a rank does with a partner, in one step of the sum."""

    partner: int
    sends: bool
    receives: bool
    replaces: bool
    """Whether what it receives is the sum already."""


def steps(rank: int, size: int) -> Iterator[Step]:
    """Yield what a rank does: recursive doubling over a power of two of the ranks.

    In step k partners whose numbers differ in bit k swap their sums, so that after log2(size) steps all have
    the whole, to the same bits, since a + b is b + a. Each of the ranks beyond the power of two first hands
    its vector to a neighbour, and takes the sum from it in the end (Thakur, Rabenseifner and Gropp 2005).
    """
    power = 1 << size.bit_length() - 1
    beyond = size - power
    if rank < 2 * beyond:
        if rank % 2:
            yield Step(rank - 1, True, False, False)
            yield Step(rank - 1, False, True, True)
            return
        yield Step(rank + 1, False, True, False)
    number = rank // 2 if rank < 2 * beyond else rank - beyond
    bit = 1
    while bit < power:
        other = number ^ bit
        yield Step(2 * other if other < beyond else other + beyond, True, True, False)
        bit *= 2
    if rank < 2 * beyond:
        yield Step(rank + 1, True, False, False)


def exchange(
    comm: MPI.Comm,
    vector: Array,
    received: Array,
    wait: Callable[[MPI.Request, int, tuple[Array, ...]], MPI.Status],
) -> None:
    """Replace `vector`, float64, by its sum over the ranks; ``vector[FAULT]`` is NaN where lengths differed.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks, with no other messages of this kind under way.
    vector : array
        At least 3 numbers, the last three being the trailer.
    received : array
        Of the same length, to be overwritten.
    wait : callable
        Waits for a request, given also the partner and the arrays that must live until it is complete, and
        returns its status.
    """
    from mpi4py import MPI

    needed = (vector, received)
    for step in steps(comm.rank, comm.size):
        incoming = comm.Irecv(received, step.partner, _TAG) if step.receives else None
        # What is sent must stay as it is until it has gone.
        outgoing = comm.Isend(vector, step.partner, _TAG) if step.sends else None
        count = 0
        if incoming is not None:
            try:
                count = wait(incoming, step.partner, needed).Get_count(MPI.DOUBLE)
            except MPI.Exception as error:
                if error.Get_error_class() != MPI.ERR_TRUNCATE:
                    raise
        if outgoing is not None:
            wait(outgoing, step.partner, needed)
        if incoming is None:
            continue
        if count != vector.size:
            vector[FAULT] = math.nan
        elif step.replaces:
            vector[:] = received
        else:
            vector += received
