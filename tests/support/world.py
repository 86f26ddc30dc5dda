"""The ranks that run the tests together, and what each gets of a batch."""

import numpy as np
from mpi4py import MPI

# What each rank gets of a batch, repeated to any world size.
SPLITS = {"even": (1,), "uneven": (5, 1, 2, 4), "empty": (3, 0, 5, 1), "first_empty": (0, 2)}


class World:
    """MPI.COMM_WORLD: all the ranks that run the tests together, or this process alone."""

    def __init__(self):
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def part(self, n, split="even", rank=None):
        """Return the slice of n samples that belongs to a rank, by default to this one."""
        rank = self.rank if rank is None else rank
        pattern = SPLITS[split]
        shares = [pattern[each % len(pattern)] for each in range(self.size)]
        if not sum(shares):
            shares = [1]
        ends = np.rint(n * np.cumsum([0, *shares]) / sum(shares)).astype(int)
        return slice(*ends[rank : rank + 2])

    def sum(self, array):
        return self.comm.allreduce(np.asarray(array).astype(np.float64))

    def assert_same(self, *arrays):
        """Check that every rank has bit-identical arrays."""
        everyones = self.comm.allgather([(array.dtype.str, array.shape, array.tobytes()) for array in arrays])
        assert all(ranks == everyones[0] for ranks in everyones)
