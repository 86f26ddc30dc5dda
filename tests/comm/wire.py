"""How many bytes leave this host in a sum, by doubling and by lanes, and how long it takes.

    wire.py LENGTH [SUMS]

Rank 0 prints a line for each: the schedule, bytes of a sum, milliseconds of the fastest.
"""

import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from cupy_syncbn import MPIProcessGroup
from support.hosts import CABLE

world = MPI.COMM_WORLD


def sent():
    """Return the bytes that this host has sent over the cable: /sys would be another host's."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.strip().partition(":")
        if name == CABLE:
            return int(counts.split()[8])
    raise LookupError(CABLE)


def main(length, sums=20):
    groups = {}
    for name, halvings in ("doubling", 0), ("lanes", 1):
        group = groups[name] = MPIProcessGroup(world.Dup(), timeout=60)
        schedule = group._opened().schedule
        assert schedule.crossing == (0, 2)  # by the names of the hosts: two nodes of two ranks
        schedule.halvings = lambda nbytes, halvings=halvings: halvings
        group.allreduce_checked(np.zeros(length))
    times, nbytes = {name: [] for name in groups}, dict.fromkeys(groups, 0)
    for _ in range(sums):
        for name, group in groups.items():
            vector = np.full(length, world.rank + 1.0)
            world.Barrier()
            start, before = time.perf_counter(), sent()
            group.allreduce_checked(vector)
            seconds = world.allreduce(time.perf_counter() - start, MPI.MAX)
            times[name].append(seconds)
            nbytes[name] += sent() - before
            assert (vector == 10).all()
    if world.rank == 0:
        for name, own in times.items():
            print(f"{name} {nbytes[name] / sums:.0f} {1e3 * min(own):.2f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
