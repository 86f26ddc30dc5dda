"""Check whether this MPI takes addresses on the GPU, by training steps with transport "cuda-aware-mpi".

    mpirun -n 2 python -m mpi4py scripts/cuda_aware_check.py

Prints one line: whether the steps equal those of the host-staged transport, and what an exchange takes by
each. An MPI that does not take such addresses ends with a segmentation fault: then there is no line, and the
launcher's exit status is none of those below. Ranks may share a GPU.

Exit status: 0 if the results are equal, 1 if not, 2 if there is nothing to check with.

What MPI libraries need:

    Open MPI    To be built for CUDA, or with a UCX that is. That of PyPI is neither, but takes the UCX of
                NVIDIA's wheel libucx-cu12 or libucx-cu13: LD_LIBRARY_PATH=.../site-packages/libucx/lib
                OMPI_MCA_pml=ucx OMPI_MCA_pml_ucx_tls=any OMPI_MCA_pml_ucx_devices=any UCX_MEMTYPE_CACHE=n
    MPICH       To be built for CUDA, as that of PyPI is not, and MPIR_CVAR_ENABLE_GPU=1
    HPE Cray    MPICH_GPU_SUPPORT_ENABLED=1
    Intel MPI   2021.13 or later, also that of PyPI, impi-rt, and
                I_MPI_OFFLOAD=1 I_MPI_OFFLOAD_MODE=cuda I_MPI_OFFLOAD_CUDA_LIBRARY=libcuda.so.1
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from cupy_syncbn import (
    DistributedDataParallel,
    ProcessGroup,
    SyncBatchNorm,
    bind_device,
    default_group,
    new_group,
)
from cupy_syncbn.backends import array_module

SHAPE = (8, 64, 14, 14)
STEPS = 3
EXCHANGES = 100
CHANNELS = 512
"""Of the exchange that is timed."""

TOLERANCE = 1e-6
"""Of the largest magnitude: the order of the sum may differ."""


def main() -> int:
    """Compare, print a line on rank 0, and return the exit status."""
    world = default_group()
    try:
        cupy = array_module("cuda")
        bind_device()
    except (RuntimeError, ModuleNotFoundError) as error:
        print(f"cuda-aware-mpi: not checked on rank {world.rank}: {error}", flush=True)
        return 2
    if world.size == 1:
        print("cuda-aware-mpi: not checked: start at least two ranks", flush=True)
        return 2
    staged, aware = (new_group(transport=name) for name in ("mpi", "cuda-aware-mpi"))
    expected = train(cupy, staged)
    found = train(cupy, aware)  # here another MPI crashes
    worst = np.array([max(map(deviation, found, expected)) > TOLERANCE], np.float64)
    world.allreduce(worst)
    times = [time_of_exchange(cupy, group) for group in (aware, staged)]
    if world.rank == 0:
        result = "results differ from" if worst[0] else "equal to"
        print(
            f"cuda-aware-mpi: {result} host-staged, {world.size} ranks of {library()}; an exchange of "
            f"{CHANNELS} channels takes {times[0]:.0f} µs, host-staged {times[1]:.0f} µs",
            flush=True,
        )
    return int(worst[0] > 0)


def train(cupy: Any, group: ProcessGroup) -> list[Any]:
    """Return what a few steps of data-parallel training give on this rank."""
    rng = np.random.default_rng(group.rank)
    layer = SyncBatchNorm(SHAPE[1], process_group=group, device="cuda", activation="relu")
    model = DistributedDataParallel(layer, group)
    results = []
    for _ in range(STEPS):
        x, dy = (cupy.asarray(rng.normal(size=SHAPE).astype("f4")) for _ in "12")
        results += [model(x).get(), model.backward(dy).get()]
        model.reduce_gradients()
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.grad
        model.zero_grad()
    for dtype in "float16", "float32", "int64":
        buffer = cupy.full(1000, group.rank, dtype)
        group.broadcast(buffer, root=group.size - 1)
        results.append(buffer.get())
    large = cupy.asarray(rng.normal(size=1 << 20).astype("f4"))
    group.allreduce(large)
    return [*results, large.get(), *(array.get() for array in layer.state_dict().values())]


def deviation(found: Any, expected: Any) -> float:
    """Return how far an array is from another, relative to its largest magnitude; NaN counts as far."""
    difference = np.abs(found.astype(np.float64) - expected)
    scale = np.abs(expected.astype(np.float64)).max() or 1.0
    worst = float(difference.max() / scale)
    return worst if worst == worst else float("inf")


def time_of_exchange(cupy: Any, group: ProcessGroup) -> float:
    """Return the microseconds that an exchange takes, with the copy of its trailer to the host."""
    vector = cupy.zeros(4 * CHANNELS + 4)
    for count in (10, EXCHANGES):
        start = time.perf_counter()
        for _ in range(count):
            group.exchange(vector)
        cupy.cuda.get_current_stream().synchronize()
    return (time.perf_counter() - start) / EXCHANGES * 1e6


def library() -> str:
    """Return the name and version of the MPI library."""
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


if __name__ == "__main__":
    sys.exit(main())
