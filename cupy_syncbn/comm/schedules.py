"""Who sends to whom in a sum over ranks; pure functions, so that tests need no MPI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Step(NamedTuple):
    """A message or two between a rank and a partner, in one step of the sum."""

    partner: int
    sends: bool
    receives: bool
    replaces: bool
    """Whether it receives the final sum."""


def steps(rank: int, size: int) -> Iterator[Step]:
    """Yield the steps of a rank: recursive doubling over a power of two of the ranks.

    In step k partners whose numbers differ in bit k swap their sums, so that after log2(size) steps all have
    the whole, to the same bits, since a + b is b + a. Each of the ranks beyond the power of two first hands
    its vector to a neighbour, and takes the sum from it at the end (Thakur, Rabenseifner and Gropp 2005).
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
