"""Ranks that take themselves to be on several nodes, and sums by lanes whatever the length."""

import os

from cupy_syncbn.comm.schedules import Schedule

NODES = "CUPY_SYNCBN_TEST_NODES"
"""The node of each rank, one digit each: the programs that tests launch read it."""

ALL = 99


def halve_always(halvings=ALL):
    """Let all vectors that have some numbers be halved so often, or as often as there are steps."""
    Schedule.halvings = lambda self, nbytes: min(halvings, len(self.crossing)) if nbytes > 40 else 0


def pretend():
    """Do what the variable asks for; return whether it does."""
    nodes = os.environ.get(NODES)
    if nodes:
        from mpi4py import MPI

        host = f"node {nodes[MPI.COMM_WORLD.rank]}"
        MPI.Get_processor_name = lambda: host
        halve_always()
    return bool(nodes)
