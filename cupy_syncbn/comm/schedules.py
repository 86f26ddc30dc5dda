"""Who sends what to whom in a sum over ranks; pure, so that it is tested without MPI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

FAULT = -3
"""Where a vector has its fault flag; NaN there tells that lengths differed."""


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
