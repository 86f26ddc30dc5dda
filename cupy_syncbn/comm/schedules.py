"""Who sends what to whom in a sum over ranks; pure functions, so that tests need no MPI.

Ranks stand in an order in which those of a node are neighbours. By that order each of the ranks beyond a
power of two first hands its vector to a neighbour, and takes the sum from it at the end; the others swap what
they have in log2(ranks) steps, nearest first (Thakur, Rabenseifner and Gropp 2005). In step k partners are
those whose numbers differ in bit k:

    doubling   They swap their whole sums, so that after the last step all have the whole, to the same bits,
               since a + b is b + a.
    lanes      In the first steps, the halvings, each keeps half of what it has, and sends the other half. In
               the other steps each has a slice, and swaps the sums of that. At last those of the first steps
               give each other what they have, in the reverse order. So the ranks of a node send slices of the
               vector through the node's one network card, and not the whole vector each.

Both meet the same partners in the same order until each rank has heard of every other: so ranks whose vectors
have different lengths, and thus other schedules, end in the same step, and know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array

WHOLE = slice(None)

# Of the choice among schedules: a network of 200 Gb/s for each node, and steps that Python makes, as measured
# and as scripts/benchmarks/scaling.py simulates them. Where messages are slower than that, so are steps: the
# choice is nearly the same on a network of 25 Gb/s and 10 us.
_STEP, _SLICED = 2.5e-6, 0.5e-6
"""Seconds of a step, and how much longer one of slices takes."""
_WIRE, _ROUND_TRIP, _RENDEZVOUS = 1.2e-6, 2.4e-6, 16384
"""Seconds between nodes, and those of a round trip, which messages of so many bytes wait for."""
_CARD = 25e9
"""Bytes per second that a node's network card sends."""
_MEMORY, _ADDITION = 6e9, 17.5e9
"""Bytes per second between ranks of a node, which take two copies, and those copied and added by NumPy."""
_NEARLY, _FEW = 1.07, 2


class Step(NamedTuple):
    """A message or two between a rank and a partner, in one step of the sum."""

    partner: int
    sends: slice | None
    """The part of the vector that goes to the partner: WHOLE or a slice."""
    receives: slice | None
    replaces: bool
    """Whether it receives the final sum."""

    @property
    def is_slice(self) -> bool:
        """Whether its messages are slices."""
        return self.sends not in (None, WHOLE)


class Schedule:
    """The steps of all ranks of a group, for vectors of any length.

    Parameters
    ----------
    nodes : sequence of int
        The node of each rank, by any numbers.
    """

    def __init__(self, nodes: Sequence[int] | Array) -> None:
        self.size = len(nodes)
        _, first, numbers = np.unique(np.asarray(nodes), return_index=True, return_inverse=True)
        numbers = np.argsort(np.argsort(first))[numbers]  # nodes in the order of their first ranks
        order = np.argsort(numbers, kind="stable")
        is_sorted = bool((np.diff(order) == 1).all())
        self._order: Any = range(self.size) if is_sorted else order.astype(np.int32)
        """The ranks by their places. It is all that grows with their number."""
        self._power = 1 << self.size.bit_length() - 1
        self._beyond = self.size - self._power
        of_number = numbers[order][[self._place(number) for number in range(self._power)]]
        self.crossing = _crossing(of_number)
        """By step: how many ranks of a node, at most, have a partner on another."""

    def _place(self, number: int) -> int:
        """Return the place of one of the ranks that swap, by its number among them."""
        return 2 * number if number < self._beyond else number + self._beyond

    def halvings(self, nbytes: int) -> int:
        """Return how often a vector of some bytes is halved, which is fastest by a simple model.

        A halving takes another step at the end. It pays where many ranks of a node send through its network
        card: from some 2 KB at 64 per node, and 10 KB at 8. Within one node vectors are never halved. If
        it is nearly as fast, at most two vectors leave a node in a step: others use the network too.
        """
        if not any(self.crossing):
            return 0
        costs = [self._seconds(nbytes, halvings) for halvings in range(len(self.crossing) + 1)]
        least = min(cost for halvings, cost in enumerate(costs) if self._leaving(halvings) <= _FEW)
        return costs.index(least if least < _NEARLY * min(costs) else min(costs))

    def _leaving(self, halvings: int) -> float:
        """Return how many vectors leave a node in a step, at most."""
        parts = [crossing / 2 ** min(step + 1, halvings) for step, crossing in enumerate(self.crossing)]
        return float(max(parts))

    def _seconds(self, nbytes: int, halvings: int) -> float:
        """Return what the steps take in which ranks swap."""
        seconds = 0.0
        for step, crossing in enumerate(self.crossing):
            sent = nbytes / 2 ** min(step + 1, halvings)
            alone = _STEP + (_SLICED if halvings else 0) + sent / _ADDITION
            if crossing:
                alone += _WIRE + sent / _CARD + (_ROUND_TRIP if sent > _RENDEZVOUS else 0)
                queue = crossing * sent / _CARD
                # While the card sends for some ranks, others make their next step: the times overlap mostly.
                alone, queue = max(alone, queue), min(alone, queue)
                alone += queue / 3
            else:
                alone += sent / _MEMORY
            seconds += alone * (2 if step < halvings else 1)
        return seconds

    def steps(self, rank: int, length: int = 0, halvings: int = 0) -> Iterator[Step]:
        """Yield the steps of a rank, for a vector of some length: of whole vectors if it is never halved."""
        order, beyond = self._order, self._beyond
        place = rank if isinstance(order, range) else int(np.flatnonzero(order == rank)[0])
        has_other = place < 2 * beyond
        other = int(order[place ^ 1]) if has_other else -1
        if has_other:
            if place % 2:
                yield Step(other, WHOLE, None, False)
                yield Step(other, None, WHOLE, True)
                return
            yield Step(other, None, WHOLE, False)
        number = place // 2 if has_other else place - beyond
        first, last, gathered = 0, length, []
        for k in range(self._power.bit_length() - 1):
            partner = int(order[self._place(number ^ 1 << k)])
            if k < halvings:
                middle = (first + last) // 2
                halves = slice(first, middle), slice(middle, last)
                kept, given = reversed(halves) if number >> k & 1 else halves
                yield Step(partner, given, kept, False)
                gathered.append(Step(partner, kept, given, True))
                first, last = kept.start, kept.stop
            else:
                part = slice(first, last) if halvings else WHOLE
                yield Step(partner, part, part, False)
        yield from reversed(gathered)
        if has_other:
            yield Step(other, WHOLE, None, False)

    def partners(self, rank: int) -> set[int]:
        """Return the ranks that a rank has messages with, whatever the length."""
        return {step.partner for step in self.steps(rank)}


def _crossing(nodes: Array) -> tuple[int, ...]:
    """Return for each step how many ranks of a node have a partner on another, by the nodes of those."""
    numbers, counts = np.arange(len(nodes)), []
    for k in range(len(nodes).bit_length() - 1):
        leaving = nodes[nodes != nodes[numbers ^ 1 << k]]
        counts.append(int(np.bincount(leaving).max()) if leaving.size else 0)
    return tuple(counts)
