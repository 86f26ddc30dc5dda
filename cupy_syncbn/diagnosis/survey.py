"""The facts: packages, and the GPU and the transport of each rank."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeAlias

import numpy as np

from cupy_syncbn._version import __version__
from cupy_syncbn.arrays import array_module, import_cupy
from cupy_syncbn.backends.cpu import loading
from cupy_syncbn.comm.devices import local_rank_in
from cupy_syncbn.comm.groups import DEFAULT_TIMEOUT, SINGLE, MPIProcessGroup, ProcessGroup, timeout_of
from cupy_syncbn.comm.launcher import (
    import_mpi,
    is_first,
    is_launched,
    launcher_variable,
    mpi_remedy,
    why_alone,
)
from cupy_syncbn.comm.transports import TRANSPORTS, nccl
from cupy_syncbn.diagnosis.report import MODULES, is_about_cpus, one_line, report, verdict
from cupy_syncbn.diagnosis.self_test import gather, self_test

if TYPE_CHECKING:
    from mpi4py import MPI

_Found: TypeAlias = dict[str, str | None]

_JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PBS_JOBID", "LSB_JOBID")

_NAME = 64
"""Characters of a name, for the same reason as REASON."""

_NOTES = {
    "mpi": "copies to memory of the host, and MPI carries that. Choose it where ranks share a GPU; it works "
    "everywhere.",
    "cuda-aware-mpi": "hands addresses on the GPU to MPI. Choose it if the MPI library was built for CUDA. "
    "One that was not crashes, so it is never tried unasked: scripts/cuda_aware_check.py in the repository "
    "finds out.",
    "nccl": "works on the GPU's own stream, and the host does not wait. Choose it with one GPU a rank.",
}

# Importing mpi4py.MPI initialises MPI unless it is told not to; another process leaves this one as it is.
_ASK_MPI = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
name, version = MPI.get_vendor()
print(json.dumps([name, ".".join(map(str, version))]))
"""


def show_config(mode: str = "stdout", *, file: TextIO | None = None) -> dict[str, Any] | None:
    """Show what is installed, each rank's GPU and transport, and whether a small batch is normalized right.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        "stdout" prints the report on rank 0; "dicts" returns the same facts on every rank.
    file : file, optional
        Where "stdout" prints; default sys.stdout.

    Returns
    -------
    dict or None
        With mode "dicts", of types that JSON has; missing things are None:

        * ``versions``: ``cupy_syncbn``, ``python``, ``numpy``, ``mpi4py``, ``cupy``, ``ml_dtypes`` of rank 0.
        * ``mpi``: ``library`` and ``version``, or the ``error`` that the start of MPI raised.
        * ``launch``: ``size``, the ranks of the world; ``launcher``, the variable by which a launcher of
          ranks was recognised; ``jobs``, the variables of the batch system.
        * ``cpu``: what computes on NumPy arrays: ``isa``, the instruction set of the compiled core that is in
          use, or "numpy"; those that were ``compiled``, and that this processor can run (``runnable``);
          ``status``, the same as a sentence, with the remedy if there is no core.
        * ``cuda``: versions of the ``driver`` (the CUDA version that it offers), ``runtime`` and ``nccl``.
        * ``ranks``: for each rank ``rank``, ``host``, ``local_rank``, ``device`` (that of a layer by default:
          "cpu" or "cuda"), ``isa``, ``gpu``, ``pci``, ``why_no_gpu``, and ``transport``, that of CuPy arrays.
        * ``transport``: ``requested`` and ``by``, CUPY_SYNCBN_TRANSPORT or "default"; ``chosen``; for each
          transport what it ``lacks``, and ``notes`` on when to choose it.
        * ``self_test``: ``passed``, ``device``, ``deviation``, ``tolerance``, ``error``.
        * ``problems`` to mend, and ``next_steps``: packages to install, commands to start.
        * ``ok``: whether the self-test has passed, and there are no problems.

    Raises
    ------
    ValueError
        If `mode` is another.

    Notes
    -----
    **Collective** over the world. In a process that no launcher started MPI is not initialised. GPUs are the
    current devices: call `bind_device` first, as training programs do and ``python -m cupy_syncbn`` does.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"expected mode 'stdout' or 'dicts' (got {mode!r})")
    facts = survey(functools.partial(print, file=file, flush=True) if mode == "stdout" else None)
    return facts if mode == "dicts" else None


def survey(
    write: Callable[[str], None] | None = None, *, as_json: bool = False, bind: bool = False
) -> dict[str, Any]:
    """Return the facts of `show_config`, and let rank 0 write them as text or JSON (**collective**).

    With `bind` each rank takes a GPU as by `bind_device`, which would raise before the ranks have met.
    """
    timeout = _timeout()
    seconds = DEFAULT_TIMEOUT if isinstance(timeout, str) else timeout
    comm, mpi_error = _world(seconds)
    group = SINGLE if comm is None else MPIProcessGroup(comm, transport="mpi", timeout=seconds)
    rows = [_Row(*values) for values in gather(group, tuple(_local_row(group, timeout, bind)))]
    facts = _facts(group, rows, mpi_error)
    if not _is_first(group):
        write = None
    if write and not as_json:
        write(report(facts))  # before the self-test, where a transport that is not there may crash
    if comm is not None:
        group = MPIProcessGroup(comm, transport=facts["transport"]["chosen"] or "mpi", timeout=seconds)
    on_gpu = all(row.device == "cuda" and row.gpu for row in rows)
    facts["self_test"] = self_test(group, "cuda" if on_gpu else "cpu")
    facts["ok"] = facts["self_test"]["passed"] and not facts["problems"]
    if write:
        write(json.dumps(facts, indent=2) if as_json else verdict(facts))
    # A rank that exits with an error may end all the others: not before the first has written.
    with contextlib.suppress(Exception):
        group.allreduce(np.zeros(1))
    return facts


def _world(seconds: float) -> tuple[MPI.Intracomm | None, str]:
    """Return the world of `default_group`, None for a single process, or why it cannot be had."""
    if "mpi4py.MPI" not in sys.modules and not is_launched():
        return None, ""
    try:
        comm = import_mpi(seconds).COMM_WORLD
    except RuntimeError as error:
        return None, one_line(error.__cause__ or error)  # the remedy stands in the next steps
    return (comm if comm.size > 1 else None), ""


def _timeout() -> float | str:
    """Return the timeout of groups, or the text of CUPY_SYNCBN_TIMEOUT if that is none."""
    try:
        return timeout_of(None)
    except ValueError:
        return one_line(os.environ["CUPY_SYNCBN_TIMEOUT"], _NAME)


def _is_first(group: ProcessGroup) -> bool:
    """Tell whether this process writes: of several, each alone in its world, the launcher's first."""
    return group.rank == 0 if group.size > 1 else is_first()


# ---- The facts of a rank ----
class _Row(NamedTuple):
    """The facts that a rank tells the others; errors and reasons are empty where there is none."""

    host: str
    local_rank: int
    device: str | None
    device_error: str
    isa: str
    gpu: str | None
    pci: str | None
    why_no_gpu: str
    requested: str
    timeout: float | str
    why_no_nccl: str


def _local_row(group: ProcessGroup, timeout: float | str, bind: bool) -> _Row:
    # Collective, so before anything that may fail.
    number = local_rank_in(group) if isinstance(group, MPIProcessGroup) else 0
    gpu, pci, why_no_gpu = _gpu(number, bind)
    device, device_error = None, ""
    try:
        device = "cpu" if array_module(None) is np else "cuda"
    except Exception as error:
        device_error = one_line(error)
    try:
        why_no_nccl = why_no_gpu or one_line(nccl.missing_for_nccl()[0])
    except Exception as error:
        why_no_nccl = one_line(error)
    requested = one_line(os.environ.get("CUPY_SYNCBN_TRANSPORT", ""), _NAME)
    host = one_line(platform.node(), _NAME)
    isa = loading.choice().isa
    return _Row(
        host, number, device, device_error, isa, gpu, pci, why_no_gpu, requested, timeout, why_no_nccl
    )


def _gpu(number: int, bind: bool) -> tuple[str | None, str | None, str]:
    """Return the name and the PCI address of the current GPU once it has worked, or why there is none."""
    try:
        cupy = array_module("cuda")
        runtime = cupy.cuda.runtime
        if bind:
            cupy.cuda.Device(number % runtime.getDeviceCount()).use()
        current = runtime.getDevice()
        name = one_line(runtime.getDeviceProperties(current)["name"].decode(), _NAME)
        pci = one_line(runtime.deviceGetPCIBusId(current), _NAME)
        cupy.asarray(np.ones(1)).get()
    except ModuleNotFoundError:
        return None, None, "CuPy is not installed"  # how to install it stands in the next steps
    except Exception as error:
        return None, None, one_line(error).removeprefix("device 'cuda': ")
    return name, pci, ""


# ---- All facts but the self-test ----
def _facts(group: ProcessGroup, rows: list[_Row], mpi_error: str) -> dict[str, Any]:
    """Return the facts (**collective**)."""
    versions, mpi, cuda = _versions(), _mpi(mpi_error), _cuda()
    launch = {
        "size": group.size,
        "launcher": launcher_variable(),
        "jobs": {name: os.environ[name] for name in _JOBS if name in os.environ},
    }
    transport, transport_problems = _transport(group, rows, mpi["error"] or "")
    ranks = [
        {"rank": rank}
        | {name: getattr(row, name) for name in ("host", "local_rank", "device", "isa", "gpu", "pci")}
        | {"why_no_gpu": row.why_no_gpu or None, "transport": transport["chosen"] if row.gpu else None}
        for rank, row in enumerate(rows)
    ]
    problems = [*_timeout_problems(rows), *_launch_problems(launch, mpi), *_device_problems(rows)]
    problems += _core_problems(rows)
    facts = {
        "versions": versions,
        "mpi": mpi,
        "launch": launch,
        "cpu": loading.facts(),
        "cuda": cuda,
        "ranks": ranks,
        "transport": transport,
        "problems": problems + transport_problems,
    }
    return facts | {"next_steps": _next_steps(versions, mpi, cuda, launch, gpus=not is_about_cpus(facts))}


def _versions() -> _Found:
    found: _Found = {"cupy_syncbn": __version__, "python": platform.python_version()}
    for name in MODULES:
        found[name] = None
        with contextlib.suppress(Exception):  # optional packages may fail in any way
            found[name] = importlib.import_module(name).__version__
    return found


def _mpi(error: str) -> _Found:
    library = version = None
    if not error:
        try:
            library, version = _vendor()
        except Exception as reason:
            error = one_line(reason)
    return {"library": library, "version": version, "error": error or None}


def _vendor() -> tuple[str, str]:
    """Return the name and the version of the MPI library, without initialising it here."""
    if "mpi4py.MPI" in sys.modules:
        name, numbers = sys.modules["mpi4py.MPI"].get_vendor()
        return name, ".".join(map(str, numbers))
    # Where mpi4py is kept from being imported here, the other process must not find it either.
    importlib.import_module("mpi4py")
    answer = subprocess.run([sys.executable, "-c", _ASK_MPI], capture_output=True, text=True, timeout=60)
    if answer.returncode:
        raise RuntimeError([f"status {answer.returncode}", *answer.stderr.split("\n")][-2])
    name, version = json.loads(answer.stdout)
    return name, version


def _cuda() -> _Found:
    found: _Found = dict.fromkeys(("driver", "runtime", "nccl"))
    number = ctypes.c_int()
    with contextlib.suppress(Exception):
        if not ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            found["driver"] = _cuda_version(number.value)
    with contextlib.suppress(Exception):
        found["runtime"] = _cuda_version(import_cupy().cuda.runtime.runtimeGetVersion())
    with contextlib.suppress(Exception):
        version = nccl.import_nccl().get_version()
        found["nccl"] = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    return found


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _transport(group: ProcessGroup, rows: list[_Row], no_mpi: str) -> tuple[dict[str, Any], list[str]]:
    """Tell which transport CuPy arrays take, the lacks of each, and the problems (**collective**)."""
    no_gpu = _first(row.why_no_gpu for row in rows)
    no_nccl = _first(row.why_no_nccl for row in rows)
    if not no_nccl and isinstance(group, MPIProcessGroup):
        no_nccl = nccl.why_no_nccl(group)
    lacks = {"mpi": no_mpi, "cuda-aware-mpi": no_mpi or no_gpu, "nccl": no_mpi or no_nccl}
    problems = _differences("CUPY_SYNCBN_TRANSPORT", [repr(row.requested or "auto") for row in rows])
    requested, chosen = rows[0].requested or "auto", None
    if requested not in TRANSPORTS:
        problems.append(f"expected CUPY_SYNCBN_TRANSPORT to be {', '.join(TRANSPORTS)} (got {requested!r})")
    elif lacks.get(requested):
        problems.append(f"CUPY_SYNCBN_TRANSPORT={requested} cannot be: {lacks[requested]}")
    elif group.size > 1:
        chosen = requested if requested != "auto" else "mpi" if no_nccl else "nccl"
    transport = {
        "requested": requested,
        "by": "CUPY_SYNCBN_TRANSPORT" if rows[0].requested else "default",
        "chosen": chosen,
        "lacks": {name: lack or None for name, lack in lacks.items()},
        "notes": _NOTES,
    }
    return transport, problems


def _first(reasons: Iterable[str]) -> str:
    """Return the reason of the first rank that has one, and which rank that is."""
    return next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason), "")


# ---- Problems and next steps ----
def _timeout_problems(rows: list[_Row]) -> list[str]:
    for rank, row in enumerate(rows):
        if isinstance(row.timeout, str):
            return [
                f"expected CUPY_SYNCBN_TIMEOUT to be seconds above 0 (got {row.timeout!r} on rank {rank})"
            ]
    return _differences("CUPY_SYNCBN_TIMEOUT", [f"{row.timeout} s" for row in rows])


def _differences(variable: str, values: list[str]) -> list[str]:
    """Return the problem that a variable has another value on another rank, if so."""
    for rank, value in enumerate(values):
        if value != values[0]:
            return [
                f"{variable} must be the same on all ranks (got {values[0]} on rank 0 and {value} on rank "
                f"{rank}): does the launcher pass it on?"
            ]
    return []


def _launch_problems(launch: dict[str, Any], mpi: _Found) -> list[str]:
    if launch["launcher"] and mpi["error"]:
        return [f"a launcher started this process, but MPI cannot be used: {mpi['error']}"]
    reason = why_alone() if launch["launcher"] and launch["size"] == 1 else ""
    return [reason] if reason else []


def _device_problems(rows: list[_Row]) -> list[str]:
    problems = []
    for rank, row in enumerate(rows):
        if row.device_error:
            problems.append(f"rank {rank}: {row.device_error}")
        elif row.device == "cuda" and not row.gpu:
            problems.append(f"rank {rank} has its layers on the GPU, which fails: {row.why_no_gpu}")
    devices = [row.device for row in rows]
    if "cpu" in devices and "cuda" in devices:
        problems.append(
            f"layers are on the CPU on rank {devices.index('cpu')} and on the GPU on rank "
            f"{devices.index('cuda')}: mend the GPU there, or set CUPY_SYNCBN_DEVICE=cpu on all ranks"
        )
    return problems


def _core_problems(rows: list[_Row]) -> list[str]:
    without = [row.isa == "numpy" for row in rows]
    if all(without) or not any(without):
        return []
    return [
        f"rank {without.index(True)} computes by NumPy, rank {without.index(False)} by the compiled core: is "
        "the package there the same, and does the launcher pass CUPY_SYNCBN_ISA on?"
    ]


def _next_steps(
    versions: _Found, mpi: _Found, cuda: _Found, launch: dict[str, Any], *, gpus: bool
) -> list[str]:
    steps = []
    if mpi["error"]:
        steps.append(f"for several ranks, {mpi_remedy()}")
    if launch["size"] == 1 and not launch["launcher"]:
        steps.append("this is a single process; on 4 ranks: mpirun -n 4 python -m mpi4py -m cupy_syncbn")
    if gpus and not versions["cupy"]:
        driver = cuda["driver"]
        major = int((driver or "0").split(".")[0])
        if major >= 12:
            steps.append(f"for the GPU, as the driver has CUDA {driver}: {_cupy_for(min(major, 13))}")
        else:
            found = f"the one here has CUDA {driver}" if major else "none was found here: no libcuda.so.1"
            steps.append(
                f"for GPUs, a driver with CUDA 12 or 13 ({found}), then {_cupy_for(13)}; with 12 for 13, if "
                "nvidia-smi shows that CUDA version"
            )
    if not versions["ml_dtypes"]:
        steps.append("for bfloat16: pip install ml_dtypes")
    return steps


def _cupy_for(major: int) -> str:
    """Return the command that installs CuPy and NCCL, as the extras of pyproject.toml do."""
    return f"pip install 'cupy-cuda{major}x[ctk]' nvidia-nccl-cu{major}"
