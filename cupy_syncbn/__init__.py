"""Synchronized batch normalization for mpirun-launched Python, without a deep-learning framework.

``SyncBatchNorm`` has the interface and the semantics of ``torch.nn.SyncBatchNorm``. It works on NumPy and
CuPy arrays: ``y = bn(x)``, ``dx = bn.backward(dy)``. Ranks started by mpirun normalize their batches as one.
"""

import logging

from cupy_syncbn._version import __version__ as __version__
from cupy_syncbn.comm.devices import bind_device, local_rank
from cupy_syncbn.comm.errors import CollectiveTimeoutError, RankMismatchError, RemoteRankError
from cupy_syncbn.comm.groups import (
    MPIProcessGroup,
    NCCLProcessGroup,
    ProcessGroup,
    SingleProcessGroup,
    default_group,
    start_mpi_of_ranks,
)
from cupy_syncbn.comm.launcher import is_first
from cupy_syncbn.comm.new_group import new_group, split_group
from cupy_syncbn.diagnosis.survey import show_config
from cupy_syncbn.functional import Gradients, sync_batch_norm, sync_batch_norm_backward
from cupy_syncbn.graphs import CapturedStep
from cupy_syncbn.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    convert_sync_batchnorm,
)
from cupy_syncbn.nn.data_parallel import DistributedDataParallel
from cupy_syncbn.nn.module import Module, no_backward
from cupy_syncbn.nn.parameter import Parameter
from cupy_syncbn.nn.records import Record
from cupy_syncbn.nn.running_statistics import frozen_statistics, recalibrate
from cupy_syncbn.nn.sequential import Sequential

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CapturedStep",
    "CollectiveTimeoutError",
    "DistributedDataParallel",
    "Gradients",
    "MPIProcessGroup",
    "Module",
    "NCCLProcessGroup",
    "Parameter",
    "ProcessGroup",
    "RankMismatchError",
    "Record",
    "RemoteRankError",
    "Sequential",
    "SingleProcessGroup",
    "SyncBatchNorm",
    "bind_device",
    "convert_sync_batchnorm",
    "default_group",
    "frozen_statistics",
    "local_rank",
    "new_group",
    "no_backward",
    "recalibrate",
    "show_config",
    "split_group",
    "sync_batch_norm",
    "sync_batch_norm_backward",
]

for _name in __all__:
    # So that pickles, messages and documentation name the package, and not the file that a class is in today.
    if isinstance(vars()[_name], type):
        vars()[_name].__module__ = __name__
del _name


def __dir__() -> list[str]:
    """Return the public names, for completion in a shell: not the package's own modules."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


logging.getLogger(__name__).addFilter(is_first)  # what it says holds for all ranks: one says it
start_mpi_of_ranks()
del is_first, logging, start_mpi_of_ranks
