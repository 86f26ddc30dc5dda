"""The ways of CuPy arrays between ranks: through the host, by an MPI that knows GPUs, or by NCCL."""

from __future__ import annotations

from cupy_syncbn.comm.transports.base import HostGroup, Transport, missing_for_cupy
from cupy_syncbn.comm.transports.cuda_aware import CUDAAware, why_no_cupy
from cupy_syncbn.comm.transports.host_staged import HostStaged
from cupy_syncbn.comm.transports.nccl import NCCL, missing_for_nccl, why_no_nccl

TRANSPORTS = ("auto", "mpi", "cuda-aware-mpi", "nccl")


def check_here(name: str) -> None:
    """Raise RuntimeError if this process lacks something that a transport needs."""
    missing = ""
    if name == "nccl":
        missing, _ = missing_for_nccl()
    elif name == "cuda-aware-mpi":
        missing, _ = missing_for_cupy()
    if missing:
        raise RuntimeError(_cannot_serve(name, missing))


def why_not(group: HostGroup, name: str) -> str:
    """Tell why a transport cannot serve a group, or nothing if it can (**collective**)."""
    missing = ""
    if name == "nccl":
        missing = why_no_nccl(group)
    elif name == "cuda-aware-mpi":
        missing = why_no_cupy(group)
    return missing and _cannot_serve(name, missing)


def _cannot_serve(name: str, missing: str) -> str:
    return f"transport {name!r}: {missing}; or leave the choice to transport 'auto', the default"


def transport_for(group: HostGroup, name: str) -> Transport:
    """Return the transport of a name; "auto" is NCCL where that can serve the group, else "mpi"."""
    if name == "nccl":
        return NCCL(group)
    if name == "cuda-aware-mpi":
        return CUDAAware(group)
    if name == "auto" and not why_no_nccl(group):
        return NCCL(group)
    return HostStaged(group)
