"""What MPI must allow, where another library calls the package from a thread of its own."""

from __future__ import annotations

from cupy_syncbn.comm.groups import ProcessGroup


def check_threads(group: ProcessGroup, level: str, reason: str) -> None:
    """Raise RuntimeError unless MPI grants a level of threads, "SERIALIZED" or "MULTIPLE"."""
    if group.size == 1:
        return
    from mpi4py import MPI

    if MPI.Query_thread() < getattr(MPI, f"THREAD_{level}"):
        raise RuntimeError(
            f"{reason}, for which MPI must grant MPI_THREAD_{level}: leave mpi4py.rc.thread_level as it is, "
            "'multiple', and use an MPI library that is built for threads"
        )
