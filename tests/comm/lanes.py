"""Sums of ranks on several nodes: right ones, wrong lengths on some ranks, and a rank that is lost.

    lanes.py NODES HALVINGS [lost]

NODES has a digit for each rank. Rank 0 prints how much came out as it should.
"""

import itertools
import re
import sys
import time

import numpy as np
from mpi4py import MPI

from cupy_syncbn import CollectiveTimeoutError, MPIProcessGroup
from cupy_syncbn.comm import checked_sum, trailer
from cupy_syncbn.comm.trailer import FAULT
from support.nodes import halve_always

LENGTHS = 5, 9, 131, 260, 1000, 16_388, 300_000
WRONG = [
    # of most ranks, of one, of another
    (260, 259, 258), (260, 131, 131), (16_388, 16_387, 9), (9, 16_388, 300_000), (16_388, 5, 64),
    (300_000, 64, 16_388), (20, 24, 28),
]  # fmt: skip
TIMEOUT = 0.4

world = MPI.COMM_WORLD


def group_of(nodes):
    group = MPIProcessGroup(world.Dup(), timeout=20)
    group.host = f"node {nodes[world.rank]}"
    return group


def check_right_sums(group):
    rng = np.random.default_rng(world.rank)
    for length in LENGTHS:
        vector = rng.normal(size=length)
        expected = world.allreduce(vector)
        group.allreduce_checked(vector)
        np.testing.assert_allclose(vector, expected, rtol=1e-9, atol=1e-12)
        assert len(set(world.allgather(vector.tobytes()))) == 1
    return len(LENGTHS)


def check_wrong_lengths(group):
    """Every one or two ranks are wrong, or wrong and failed: all ranks hear the same of it."""
    ranks, done = range(group.size), 0
    for wrong in [*itertools.combinations(ranks, 1), *itertools.combinations(ranks, 2)]:
        for length, *others in WRONG:
            own = others[wrong.index(group.rank)] if group.rank in wrong else length
            vector = np.zeros(own)
            group.allreduce_checked(vector)
            assert np.isnan(vector[FAULT]), (wrong, length, others)
            done += 1
        for length, other in ((260, 300), (16_388, 20), (20, 16_388)):
            own = other if group.rank == wrong[0] else length
            if group.rank == wrong[-1]:
                ending = group.tell_fault((trailer.fault_code(group.rank, group.size), 0, 0, 0, 0), own, np)
            else:
                ending = np.zeros(own)
                group.allreduce_checked(ending)
            expected = trailer.fault_code(wrong[-1], group.size)
            if len(wrong) == 2 and group.size > 2:
                expected = np.nan  # two that have not failed add up vectors of different lengths
            np.testing.assert_equal(ending[FAULT], expected)
            done += 1
    return done


class Lost:
    """Let this rank be lost at some wait of its sums."""

    def __init__(self, group, number):
        self.private, self.left = group._opened(), number
        self.wait, self.private.wait = self.private.wait, self

    def __call__(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise EOFError
        return self.wait(*arguments)


def check_lost(nodes):
    """One rank stops in the middle of a sum, after some of its waits: the others end, and blame it.

    Returns how often some rank waited for it: if it had sent all that the others needed, none does.
    """
    done = 0
    for lost in range(world.size):
        for number in range(3):
            group = group_of(nodes)
            group.allreduce_checked(np.zeros(64))
            group.timeout = TIMEOUT
            start, error = time.monotonic(), None
            try:
                if world.rank == lost:
                    group._opened().leave = lambda *arguments: None  # as one that is dead it tells nobody
                    Lost(group, number)
                group.allreduce_checked(np.zeros(64))
            except (CollectiveTimeoutError, EOFError) as caught:
                error = caught
            errors = world.allgather((None if error is None else type(error).__name__, str(error)))
            assert time.monotonic() - start < TIMEOUT + 4
            # A rank that has all it needs is done, and does not wait; of the others each names the lost one.
            heard = [text for kind, text in errors if kind == "CollectiveTimeoutError"]
            assert all(re.search(rf"for ranks? [^:]*\b{lost}\b", text) for text in heard), (lost, errors)
            done += bool(heard)
    return done


def main(nodes, halvings, what=""):
    halve_always(int(halvings))
    if what == "lost":
        print_from_first(f"{check_lost(nodes)} lost")
        return
    group = group_of(nodes)
    right = check_right_sums(group)
    wrong = check_wrong_lengths(group)
    right += check_right_sums(group)
    kinds = {type(each).__name__ for length, each in group._opened()._sums.items() if length == 16_388}
    assert kinds == ({"SlicedSum"} if int(halvings) else {"CheckedSum"})
    assert max(LENGTHS) > checked_sum.LONGEST
    print_from_first(f"{right} right, {wrong} wrong")


def print_from_first(text):
    if world.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
