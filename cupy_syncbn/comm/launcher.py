"""Whether an MPI launcher started this process."""

from __future__ import annotations

import functools
import os
import sys

# Set for each rank by the launchers of Open MPI, MPICH and Intel MPI (also by srun --mpi=pmi2),
# PMIx (srun --mpi=pmix, prterun), MVAPICH2 and 3, and HPE Cray's PALS and ALPS.
LAUNCHER_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "MV2_COMM_WORLD_RANK",
    "MVP_COMM_WORLD_RANK",
    "PALS_RANKID",
    "ALPS_APP_PE",
)


@functools.cache
def is_launched() -> bool:
    """Tell whether an MPI launcher started this process."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES) and not _is_worker()


def _is_worker() -> bool:
    """Tell whether multiprocessing started this: it has a rank's variables, but must not start MPI."""
    if "multiprocessing" not in sys.modules:
        return False
    from multiprocessing import parent_process

    # While the program is imported there, only the name of its module tells.
    program = getattr(sys.modules.get("__mp_main__"), "__name__", "")
    return program == "__mp_main__" or parent_process() is not None
