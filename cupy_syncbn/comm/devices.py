"""The GPU of each process of a node."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cupy_syncbn.arrays import array_module
from cupy_syncbn.comm.groups import MPIProcessGroup, as_group
from cupy_syncbn.comm.small_objects import number_of

if TYPE_CHECKING:
    from mpi4py import MPI


def local_rank(comm: MPI.Intracomm | None = None) -> int:
    """Return this process's number among those of `comm` on the same node.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        Default MPI.COMM_WORLD, or a single process as in `default_group`.

    Returns
    -------
    int
        From 0 on.

    Raises
    ------
    CollectiveTimeoutError
        If a process does not come within CUPY_SYNCBN_TIMEOUT seconds (600).

    Notes
    -----
    **Collective** over `comm`. Processes under one kernel are on one node. MPI_COMM_TYPE_SHARED is not used,
    since some builds and launchers of MPI put each process in a part of its own.
    """
    group = as_group(comm)  # with a problem too, of which the other ranks would not hear here
    return local_rank_in(group) if isinstance(group, MPIProcessGroup) else 0


def local_rank_in(group: MPIProcessGroup) -> int:
    """Return this process's number among those of a group on the same node (**collective**)."""
    own = number_of(_node())
    return int(np.count_nonzero(group.gather_numbers(own)[: group.rank] == own))


def _node() -> str:
    """Return a name of this process's node."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()  # of a kernel, whatever its containers
    return socket.gethostname()


def bind_device(comm: MPI.Intracomm | None = None) -> int:
    """Make one of the node's GPUs the current device, and return its number; see `local_rank`.

    The number is the local rank, modulo the number of GPUs that this process sees. So it is 0 where the
    launcher shows each process one GPU only. It raises ModuleNotFoundError if CuPy is not installed, and
    RuntimeError if CuPy finds no driver or no GPU. **Collective** over `comm`.
    """
    rank = local_rank(comm)
    cupy = array_module("cuda")
    number: int = rank % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(number).use()
    return number
