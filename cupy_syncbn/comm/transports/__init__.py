"""The ways of CuPy arrays between ranks: through the host, by an MPI that knows GPUs, or by NCCL."""

from __future__ import annotations

from cupy_syncbn.comm.transports.base import HostGroup, Transport
from cupy_syncbn.comm.transports.cuda_aware import CUDAAware
from cupy_syncbn.comm.transports.host_staged import HostStaged
from cupy_syncbn.comm.transports.nccl import NCCL, why_no_nccl

TRANSPORTS = ("auto", "mpi", "cuda-aware-mpi", "nccl")


def transport_for(group: HostGroup, name: str) -> Transport:
    """Return the transport of a name; "auto" is NCCL where that can serve the group, else "mpi"."""
    if name == "nccl":
        return NCCL(group)
    if name == "cuda-aware-mpi":
        return CUDAAware(group)
    if name == "auto" and not why_no_nccl(group):
        return NCCL(group)
    return HostStaged(group)
