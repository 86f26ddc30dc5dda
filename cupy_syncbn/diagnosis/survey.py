"""What is installed here, which GPU and which transport each rank has, and whether they work together."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

from cupy_syncbn._version import __version__
from cupy_syncbn.arrays import array_module, import_cupy
from cupy_syncbn.comm import groups, launcher
from cupy_syncbn.comm.devices import local_rank_in
from cupy_syncbn.comm.groups import MPIProcessGroup, ProcessGroup, SingleProcessGroup
from cupy_syncbn.comm.transports import TRANSPORTS, nccl
from cupy_syncbn.nn.batch_norm import SyncBatchNorm

if TYPE_CHECKING:
    from mpi4py import MPI

CHANNELS, EPS = 5, 1e-5
TOLERANCE = 1e-5
"""Of the self-test in float32, relative to the largest magnitude: a wrong sum is off by far more."""

_MODULES = {"numpy": "NumPy", "mpi4py": "mpi4py", "cupy": "CuPy", "ml_dtypes": "ml_dtypes"}

# How many processes the launcher started; Slurm's last, as an mpirun may run in a step of it.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PBS_JOBID", "LSB_JOBID")

# Characters: a rank's facts must fit into a message of `gather_objects`, of 1024 bytes.
_REASON, _NAME = 200, 64

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
        With mode "dicts", of types that JSON has; what is not there is None:

        * ``versions``: ``cupy_syncbn``, ``python``, ``numpy``, ``mpi4py``, ``cupy``, ``ml_dtypes`` of rank 0.
        * ``mpi``: ``library`` and ``version``, or the ``error`` that importing mpi4py.MPI raised.
        * ``launch``: ``size``, the ranks of the world; ``launcher``, the variable by which a launcher was
          recognised; ``jobs``, the variables of the batch system.
        * ``cuda``: versions of the ``driver`` (the CUDA version that it offers), ``runtime`` and ``nccl``.
        * ``ranks``: for each rank ``rank``, ``host``, ``local_rank``, ``device`` (that of a layer by default:
          "cpu" or "cuda"), ``gpu``, ``pci``, ``why_no_gpu``, and ``transport``, that of CuPy arrays.
        * ``transport``: ``requested`` and ``by``, CUPY_SYNCBN_TRANSPORT or "default"; ``chosen``; for each
          transport what it ``lacks``, and ``notes`` on when to choose it.
        * ``self_test``: ``passed``, ``device``, ``deviation``, ``tolerance``, ``error``.
        * ``problems``: what has to be mended, and ``next_steps``: what could be installed or started.
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
    """Return what `show_config` does, and let rank 0 write it as text or JSON (**collective**).

    With `bind` each rank takes a GPU as by `bind_device`, which would raise before the ranks have met.
    """
    comm, mpi_error = world()
    several = comm is not None and comm.size > 1
    timeout = _timeout()
    seconds = groups.DEFAULT_TIMEOUT if isinstance(timeout, str) else timeout
    group = MPIProcessGroup(comm, transport="mpi", timeout=seconds) if comm and several else _SINGLE
    rows = [_Row(*values) for values in _gather(group, tuple(_own_row(group, timeout, bind)))]
    problems = _wrong_timeouts(rows)
    facts = _facts(group, rows, mpi_error, problems)
    own_write = write if write and _is_first(group) else None
    if own_write and not as_json:
        own_write(_report(facts))  # before the self-test, where a transport that is not there may crash
    if comm and several:
        group = MPIProcessGroup(comm, transport=facts["transport"]["chosen"] or "mpi", timeout=seconds)
    facts["self_test"] = _self_test(group, all(row.device == "cuda" and row.gpu for row in rows))
    facts["ok"] = facts["self_test"]["passed"] and not problems
    if own_write:
        own_write(json.dumps(facts, indent=2) if as_json else _verdict(facts))
    if several:
        # A rank that exits with an error may end all the others: not before the first has written.
        with contextlib.suppress(Exception):
            group.allreduce(np.zeros(1))
    return facts


def world() -> tuple[MPI.Intracomm | None, str]:
    """Return the world of `default_group`, None for a single process, and why it cannot be had, if so."""
    if "mpi4py.MPI" not in sys.modules and not launcher.is_launched():
        return None, ""
    try:
        from mpi4py import MPI
    except Exception as error:  # ImportError without mpi4py, RuntimeError without a library of MPI
        return None, _short(error)
    return MPI.COMM_WORLD, ""


class _Row(NamedTuple):
    """What a rank tells the others."""

    host: str
    local_rank: int
    device: str | None
    device_error: str
    gpu: str | None
    pci: str | None
    why_no_gpu: str
    requested: str
    timeout: float | str
    """In seconds, or what CUPY_SYNCBN_TIMEOUT says instead."""
    why_no_nccl: str


_SINGLE = SingleProcessGroup()


# ---- What is here ----
def _own_row(group: ProcessGroup, timeout: float | str, bind: bool) -> _Row:
    # Collective, so before anything that may fail.
    number = local_rank_in(group) if isinstance(group, MPIProcessGroup) else 0
    gpu = pci = device = None
    device_error = why_no_gpu = ""
    try:
        cupy = array_module("cuda")
        if bind:
            cupy.cuda.Device(number % cupy.cuda.runtime.getDeviceCount()).use()
        current = cupy.cuda.runtime.getDevice()
        gpu = _short(cupy.cuda.runtime.getDeviceProperties(current)["name"].decode(), _NAME)
        pci = _short(cupy.cuda.runtime.deviceGetPCIBusId(current), _NAME)
        cupy.asarray(np.ones(1)).get()
    except ModuleNotFoundError:
        why_no_gpu = "CuPy is not installed"  # how to install it stands in the next steps
    except Exception as error:
        gpu = pci = None
        why_no_gpu = _short(error).removeprefix("device 'cuda': ")
    try:
        device = "cpu" if array_module(None) is np else "cuda"
    except Exception as error:
        device_error = _short(error)
    try:
        why_no_nccl = why_no_gpu or _short(nccl.missing_for_nccl()[0])
    except Exception as error:
        why_no_nccl = _short(error)
    requested = _short(os.environ.get("CUPY_SYNCBN_TRANSPORT", ""), _NAME)
    host = _short(platform.node(), _NAME)
    return _Row(host, number, device, device_error, gpu, pci, why_no_gpu, requested, timeout, why_no_nccl)


def _wrong_timeouts(rows: list[_Row]) -> list[str]:
    everyones = [row.timeout for row in rows]
    for rank, seconds in enumerate(everyones):
        if isinstance(seconds, str):
            return [f"expected CUPY_SYNCBN_TIMEOUT to be seconds above 0 (got {seconds!r} on rank {rank})"]
    other = next((rank for rank, seconds in enumerate(everyones) if seconds != everyones[0]), None)
    if other is None:
        return []
    return [
        f"CUPY_SYNCBN_TIMEOUT must be the same on all ranks (got {everyones[0]} s on rank 0 and "
        f"{everyones[other]} s on rank {other}): does the launcher pass it on?"
    ]


def _facts(group: ProcessGroup, rows: list[_Row], mpi_error: str, problems: list[str]) -> dict[str, Any]:
    """Gather all but the self-test; `problems` grows."""
    mpi = _mpi(mpi_error)
    launch = {
        "size": group.size,
        "launcher": next((name for name in launcher.LAUNCHER_VARIABLES if name in os.environ), None),
        "jobs": {name: os.environ[name] for name in _JOBS if name in os.environ},
    }
    started = int(next((os.environ[name] for name in _SIZES if os.environ.get(name, "").isdecimal()), 1))
    if launch["launcher"] and mpi["error"]:
        problems.append(f"a launcher started this process, but MPI cannot be used: {mpi['error']}")
    elif started > 1 and group.size == 1:
        problems.append(
            f"{started} processes were started, but each is alone in its world: the launcher must be that of "
            f"the MPI library, {mpi['library']} (with srun, see --mpi=pmix and --mpi=pmi2)"
        )
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
    transport = _transport(group, rows, mpi["error"] or "", problems)
    cuda, versions = _cuda(), _versions()
    return {
        "versions": versions,
        "mpi": mpi,
        "launch": launch,
        "cuda": cuda,
        "ranks": [
            {
                "rank": rank,
                "host": row.host,
                "local_rank": row.local_rank,
                "device": row.device,
                "gpu": row.gpu,
                "pci": row.pci,
                "why_no_gpu": row.why_no_gpu or None,
                "transport": transport["chosen"] if row.gpu else None,
            }
            for rank, row in enumerate(rows)
        ],
        "transport": transport,
        "problems": problems,
        "next_steps": _next_steps(versions, mpi, cuda, launch),
    }


def _transport(group: ProcessGroup, rows: list[_Row], no_mpi: str, problems: list[str]) -> dict[str, Any]:
    """Tell which transport CuPy arrays take, and why, or why not, of each (**collective**)."""
    everyones = [row.requested or "auto" for row in rows]
    requested = everyones[0]
    other = next((rank for rank, name in enumerate(everyones) if name != requested), None)
    if other is not None:
        problems.append(
            f"CUPY_SYNCBN_TRANSPORT must be the same on all ranks (got {requested!r} on rank 0 and "
            f"{everyones[other]!r} on rank {other}): does the launcher pass it on?"
        )
    without = next((rank for rank, row in enumerate(rows) if row.why_no_gpu), None)
    no_gpu = "" if without is None else f"rank {without}: {rows[without].why_no_gpu}"
    no_nccl = next(
        (f"rank {rank}: {row.why_no_nccl}" for rank, row in enumerate(rows) if row.why_no_nccl), ""
    )
    if not no_nccl and isinstance(group, MPIProcessGroup):
        no_nccl = nccl.why_no_nccl(group)
    lacks = {"mpi": no_mpi, "cuda-aware-mpi": no_mpi or no_gpu, "nccl": no_mpi or no_nccl}
    chosen = None
    if requested not in TRANSPORTS:
        problems.append(f"expected CUPY_SYNCBN_TRANSPORT to be {', '.join(TRANSPORTS)} (got {requested!r})")
    elif lacks.get(requested):
        problems.append(f"CUPY_SYNCBN_TRANSPORT={requested} cannot be: {lacks[requested]}")
    elif group.size > 1:
        chosen = requested if requested != "auto" else "mpi" if no_nccl else "nccl"
    return {
        "requested": requested,
        "by": "CUPY_SYNCBN_TRANSPORT" if rows[0].requested else "default",
        "chosen": chosen,
        "lacks": {name: lack or None for name, lack in lacks.items()},
        "notes": _NOTES,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"cupy_syncbn": __version__, "python": platform.python_version()}
    for name in _MODULES:
        found[name] = _try(functools.partial(_version, name))
    return found


def _version(module: str) -> str:
    version: str = importlib.import_module(module).__version__
    return version


def _mpi(error: str) -> dict[str, str | None]:
    """Tell the library of MPI, without initialising it here."""
    library = version = None
    if not error and "mpi4py.MPI" in sys.modules:
        name, numbers = sys.modules["mpi4py.MPI"].get_vendor()
        library, version = name, ".".join(map(str, numbers))
    elif not error:
        # Where mpi4py is kept from being imported here, the other process must not find it either.
        try:
            importlib.import_module("mpi4py")
            answer = subprocess.run(
                [sys.executable, "-c", _ASK_MPI], capture_output=True, text=True, timeout=60
            )
            if answer.returncode:
                error = _short(([f"status {answer.returncode}", *answer.stderr.split("\n")])[-2])
            else:
                library, version = json.loads(answer.stdout)
        except Exception as reason:
            error = _short(reason)
    return {"library": library, "version": version, "error": error or None}


def _cuda() -> dict[str, str | None]:
    def driver() -> str:
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            raise RuntimeError("the driver does not answer")
        return _cuda_version(number.value)

    return {
        "driver": _try(driver),
        "runtime": _try(lambda: _cuda_version(import_cupy().cuda.runtime.runtimeGetVersion())),
        "nccl": _try(lambda: _nccl_version(nccl.import_nccl().get_version())),
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _nccl_version(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _next_steps(
    versions: dict[str, str | None],
    mpi: dict[str, str | None],
    cuda: dict[str, str | None],
    launch: dict[str, Any],
) -> list[str]:
    steps = []
    if mpi["error"]:
        steps.append("for several ranks, install MPI: pip install mpi4py mpich")
    if launch["size"] == 1 and not launch["launcher"]:
        steps.append("this is a single process; on 4 ranks: mpirun -n 4 python -m mpi4py -m cupy_syncbn")
    if not versions["cupy"]:
        major = int((cuda["driver"] or "0").split(".")[0])
        if major >= 12:
            steps.append(f"for the GPU, as the driver has CUDA {cuda['driver']}: {_cupy_for(min(major, 13))}")
        else:
            found = (
                f"the one here has CUDA {cuda['driver']}" if major else "none was found here: no libcuda.so.1"
            )
            steps.append(
                f"for GPUs, a driver with CUDA 12 or 13 ({found}), then {_cupy_for(13)}; with 12 for 13, if "
                "nvidia-smi shows that CUDA version"
            )
    if not versions["ml_dtypes"]:
        steps.append("for bfloat16: pip install ml_dtypes")
    return steps


def _cupy_for(major: int) -> str:
    """Return what installs CuPy, CUDA's libraries and NCCL, as the extras of pyproject.toml do."""
    return f"pip install 'cupy-cuda{major}x[ctk]' nvidia-nccl-cu{major}"


# ---- Whether it works ----
def _self_test(group: ProcessGroup, on_gpu: bool) -> dict[str, Any]:
    """Add up four numbers, normalize a batch, forward and backward, and compare (**collective**)."""
    deviation, error = 0.0, ""
    try:
        deviation = _deviation(group, "cuda" if on_gpu else "cpu")
    except Exception as reason:
        error = f"rank {group.rank}: {_short(reason)}"
    everyones = [(deviation, error)]
    with contextlib.suppress(Exception):  # after a timeout nothing more can be heard of the others
        everyones = _gather(group, everyones[0])
    error = next((each for _, each in everyones if each), "")
    worst = float(np.max([each for each, _ in everyones]))
    return {
        "passed": not error and worst <= TOLERANCE,
        "device": "cuda" if on_gpu else "cpu",
        "deviation": worst if math.isfinite(worst) and not error else None,
        "tolerance": TOLERANCE,
        "error": error or (None if math.isfinite(worst) else "the results are not finite"),
    }


def _deviation(group: ProcessGroup, device: str) -> float:
    """Return how far this rank is off, relative to the largest magnitude of each array."""
    library = array_module(device)
    rank, ranks = group.rank, np.arange(group.size, dtype=float)
    numbers = library.asarray(np.array([1.0, rank, rank * rank, 0.5]))
    group.allreduce(numbers)
    layer = SyncBatchNorm(CHANNELS, EPS, process_group=group, device=device, name="self-test")
    x, dy = _batch(rank)
    y = layer(library.asarray(x))
    dx = layer.backward(library.asarray(dy))
    group.check_errors()

    # The whole batch, by the formulas of Ioffe and Szegedy (2015) in float64.
    batches = [_batch(each) for each in range(group.size)]
    whole_x, whole_dy = (np.concatenate(each).astype(float) for each in zip(*batches, strict=True))
    before = sum(len(each) for each, _ in batches[:rank])
    own = slice(before, before + len(x))
    over: dict[str, Any] = {"axis": (0, 2), "keepdims": True}
    invstd = 1 / np.sqrt(whole_x.var(**over) + EPS)
    whole_y = (whole_x - whole_x.mean(**over)) * invstd
    whole_dx = whole_dy - whole_dy.mean(**over) - whole_y * (whole_dy * whole_y).mean(**over)
    whole_dx *= invstd
    sums = np.array([group.size, ranks.sum(), ranks @ ranks, group.size / 2])
    pairs = [(numbers, sums, sums), (y, whole_y[own], whole_y), (dx, whole_dx[own], whole_dx)]
    return max(
        float(np.max(np.abs(_on_host(actual) - expected)) / np.max(np.abs(whole)))
        for actual, expected, whole in pairs
    )


def _batch(rank: int) -> tuple[Any, Any]:
    """Return x and dy of a rank; the ranks have one to three samples."""
    rng = np.random.default_rng(rank)
    shape = (1 + rank % 3, CHANNELS, 8)
    return rng.normal(rank % 7, 2, shape).astype("float32"), rng.normal(size=shape).astype("float32")


# ---- The report ----
def _report(facts: dict[str, Any]) -> str:
    versions, mpi, launch, cuda = (facts[key] for key in ("versions", "mpi", "launch", "cuda"))
    packages = [f"{shown} {versions[name] or 'not installed'}" for name, shown in _MODULES.items()]
    library = f"{mpi['library']} {mpi['version']}" if mpi["library"] else f"none ({mpi['error']})"
    started = f"started by a launcher: {launch['launcher']} is set" if launch["launcher"] else "by itself"
    jobs = "".join(f", {name} {value}" for name, value in launch["jobs"].items())
    driver = f"driver for {cuda['driver']}" if cuda["driver"] else "no driver"
    lines = [
        f"cupy_syncbn {versions['cupy_syncbn']}, Python {versions['python']}, {', '.join(packages)}",
        f"MPI:   {library}",
        f"start: {launch['size']} rank{'s' * (launch['size'] > 1)} ({started}{jobs})",
        f"CUDA:  {driver}, runtime {cuda['runtime'] or 'none'}, NCCL {cuda['nccl'] or 'none'}",
        "",
    ]
    table = [("rank", "host", "local rank", "transport", "GPU")]
    for row in facts["ranks"]:
        gpu = f"{row['gpu']}, {row['pci']}" if row["gpu"] else f"none: {row['why_no_gpu']}"
        table.append((str(row["rank"]), row["host"], str(row["local_rank"]), row["transport"] or "-", gpu))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    transport = facts["transport"]
    by = "the default" if transport["by"] == "default" else "from CUPY_SYNCBN_TRANSPORT"
    requested, chosen = transport["requested"], transport["chosen"]
    if requested == "auto" and chosen:
        result = f"takes {chosen}" + (
            ", as nccl is not here" if chosen == "mpi" else ", which all ranks have"
        )
    elif requested not in TRANSPORTS:
        result = "is unknown"
    elif transport["lacks"].get(requested):
        result = "is not here"
    else:
        result = "is taken" if chosen else "has nothing to do for one rank"
    lines += ["", f"CuPy arrays: {requested}, {by}, {result}. NumPy arrays go by MPI."]
    for name, note in transport["notes"].items():
        mark = "->" if name == transport["chosen"] else "  "
        lack = transport["lacks"][name]
        lines.append(_wrapped(f"{mark} {name:14}  ", note + (f" Not here: {lack}." if lack else "")))
    if chosen == "cuda-aware-mpi":
        lines += ["", "The self-test tries it: a segmentation fault now means that MPI does not know GPUs."]
    return "\n".join(lines)


def _verdict(facts: dict[str, Any]) -> str:
    test, size = facts["self_test"], facts["launch"]["size"]
    found = test["error"] or f"worst deviation {test['deviation']:.1e}, at most {test['tolerance']:g} allowed"
    result = "passed" if test["passed"] else "FAILED"
    lines = ["", f"self-test on {size} rank{'s' * (size > 1)}, device {test['device']}: {result} ({found})"]
    lines += [_wrapped("problem: ", problem) for problem in facts["problems"]]
    lines += [_wrapped("next: ", step) for step in facts["next_steps"]]
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        text,
        width=110,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


# ---- Helpers ----
def _is_first(group: ProcessGroup) -> bool:
    """Tell whether this process writes: of several, each alone in its world, the launcher's first."""
    if group.size > 1:
        return group.rank == 0
    variables = (*launcher.LAUNCHER_VARIABLES, "SLURM_PROCID")
    return next((os.environ[name] for name in variables if name in os.environ), "0") == "0"


def _gather(group: ProcessGroup, value: Any) -> list[Any]:
    return group.gather_objects(value) if isinstance(group, MPIProcessGroup) else [value]


def _timeout() -> float | str:
    """Return the timeout of groups, or the text that is none."""
    try:
        return groups.timeout_of(None)
    except ValueError:
        return _short(os.environ["CUPY_SYNCBN_TIMEOUT"], _NAME)


def _try(find: Callable[[], str]) -> str | None:
    """Return what is found; what is optional may fail in any way."""
    try:
        return find()
    except Exception:
        return None


def _short(text: object, length: int = _REASON) -> str:
    """Return one line of ASCII, of at most `length` characters."""
    line = " ".join(str(text).split())
    if isinstance(text, Exception):
        line = line or type(text).__name__
    line = line.encode("ascii", "replace").decode()
    return line if len(line) <= length else line[: length - 3] + "..."


def _on_host(array: Any) -> Any:
    return array if isinstance(array, np.ndarray) else array.get()
