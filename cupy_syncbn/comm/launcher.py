"""What the launcher says of this process, and the start of MPI in it."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import shutil
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType

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

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE")
_SLURM_SIZE = "SLURM_STEP_NUM_TASKS"

# What tells two launches apart, or two ranks of one: an mpirun within a rank changes some of these.
_IDENTITY = (
    *LAUNCHER_VARIABLES,
    *_SIZES,
    "PMIX_NAMESPACE",
    "PMI_FD",
    "PMI_PORT",
    "PMI_ID",
    "PMI_JOBID",
    "PALS_APID",
    "ALPS_APP_ID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
)

_MARK = "_CUPY_SYNCBN_RANK"
"""The variable in which the process that starts MPI tells its children who the rank is."""

_LONGEST = 1e8
"""Seconds: some timers take no more, and no job lasts three years."""

FINALIZED = (
    "MPI is finalized, and no message can be sent any more: call MPI.Finalize() after the last use of a "
    "group, or leave it to mpi4py, which calls it when the process ends"
)


# ---- What the launcher says ----
def started() -> int | None:
    """Return how many processes the launcher started together with this one; None if it does not say."""
    sizes = [int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdecimal()]
    if sizes:
        return max(sizes)  # one launcher within another leaves the variables of both
    # Slurm's last, as an mpirun may run in a step of it. So may PRRTE's prterun, which tells no size.
    if "PMIX_RANK" in os.environ and not os.environ.get("PMIX_NAMESPACE", "slurm").startswith("slurm"):
        return None
    size = os.environ.get(_SLURM_SIZE, "")
    return int(size) if size.isdecimal() else None


def launcher_variable() -> str | None:
    """Return the variable by which a launch is recognised; None if there is none, or this is no rank."""
    if not is_launched():
        return None
    names = (*LAUNCHER_VARIABLES, *_SIZES, _SLURM_SIZE)
    return next((name for name in names if name in os.environ), None)


def is_launched() -> bool:
    """Tell whether this process is a rank: of several, or of a number that the launcher does not tell."""
    return _is_launched(os.getpid())


@functools.cache
def _is_launched(pid: int) -> bool:
    if _is_started_by_a_rank(pid):
        return False
    size = started()
    return any(name in os.environ for name in LAUNCHER_VARIABLES) if size is None else size > 1


def _is_started_by_a_rank(pid: int) -> bool:
    return _is_worker() or _is_child(pid)


def _is_worker() -> bool:
    """Tell whether multiprocessing started this: it has a rank's variables, but must not start MPI."""
    if "multiprocessing" not in sys.modules:
        return False
    from multiprocessing import parent_process

    # While the program is imported there, only the name of its module tells.
    program = getattr(sys.modules.get("__mp_main__"), "__name__", "")
    return program == "__mp_main__" or parent_process() is not None


def _is_child(pid: int) -> bool:
    """Tell whether a rank started this process, with its own variables: MPI serves the rank alone."""
    rank_pid, _, rank = os.environ.get(_MARK, "").partition(" ")
    if not rank or rank_pid == str(pid):  # the same process: it is still the rank after an exec
        return False
    rank_values, _, rank_socket = rank.rpartition(" ")
    socket = _socket()
    # An mpirun within a rank may give the same numbers, but by a connection of its own. Without any this
    # is no rank: Python closes files in the processes that it starts.
    return rank_values == _values() and (not socket or socket == rank_socket)


def _values() -> str:
    return ",".join(f"{name}={os.environ[name]}" for name in _IDENTITY if name in os.environ)


def _socket() -> str:
    """Return the number of the connection to the launcher that PMI_FD names, empty if there is none."""
    with contextlib.suppress(KeyError, ValueError, OSError):
        status = os.fstat(int(os.environ["PMI_FD"]))
        if stat.S_ISSOCK(status.st_mode):
            return str(status.st_ino)
    return ""


def is_first(_: object = None) -> bool:
    """Tell whether this is the first of the launcher's processes, or the only one: also a logger's filter."""
    variables = (*LAUNCHER_VARIABLES, "SLURM_PROCID")
    return next((os.environ[name] for name in variables if name in os.environ), "0") == "0"


# ---- The start of MPI ----
_failure: list[Exception] = []  # what the start of MPI raised: a second one could only fail worse


def start_if_one_of_several(seconds: float) -> None:
    """Start MPI if the launcher started several processes; what goes wrong is raised at the first use.

    So a rank that fails before it has met the others is ended by mpi4py's runner together with them.
    """
    if "mpi4py.MPI" in sys.modules:
        _leave_mark()
    elif started() is not None and is_launched() and _may_initialize():
        _start(seconds)


def import_mpi(seconds: float) -> ModuleType:
    """Return mpi4py.MPI, started; raise RuntimeError with the remedy if that cannot be."""
    if "mpi4py.MPI" not in sys.modules and _is_started_by_a_rank(os.getpid()):
        raise RuntimeError(
            "a rank started this process, which is none itself: leave the exchanges to the rank, or use "
            "process_group=SingleProcessGroup() here"
        )
    if "mpi4py.MPI" not in sys.modules and not _failure:
        _start(seconds)
    if "mpi4py.MPI" not in sys.modules:
        (cause,) = _failure
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise RuntimeError(
            f"MPI cannot be used: {reason}; {mpi_remedy()}; "
            "or train each process by itself, with process_group=SingleProcessGroup()"
        ) from cause
    return initialized_mpi()


def initialized_mpi() -> ModuleType:
    """Return mpi4py.MPI, which is imported; raise RuntimeError unless it runs: else it ends the process."""
    from mpi4py import MPI

    if not MPI.Is_initialized():
        raise RuntimeError(
            "MPI is not initialized, as mpi4py.rc.initialize is False: call MPI.Init() or MPI.Init_thread() "
            "before the first call that needs ranks, or leave mpi4py.rc.initialize as it is"
        )
    if MPI.Is_finalized():
        raise RuntimeError(FINALIZED)
    _leave_mark()
    return MPI


@functools.cache
def warn_if_alone() -> None:
    """Warn, once, if the world should have more ranks than this."""
    reason = why_alone()
    if reason:
        remedy = "if they are to be, say so by process_group=SingleProcessGroup()"
        warnings.warn(f"{reason}; {remedy}", RuntimeWarning, stacklevel=4)


def why_alone() -> str:
    """Return what to check if several processes were started, and each is alone in its MPI world."""
    from mpi4py import MPI

    size = started() or 1
    # A rank that another program started by MPI_Comm_spawn may well be alone.
    if not is_launched() or size == 1 or MPI.COMM_WORLD.size > 1 or MPI.Comm.Get_parent() != MPI.COMM_NULL:
        return ""
    return (
        f"{size} processes were started, but each is alone in its world: the launcher must be that of the "
        f"MPI library, {MPI.get_vendor()[0]} (with srun, see --mpi=pmix and --mpi=pmi2)"
    )


def mpi_remedy() -> str:
    """Return what gives this Python an MPI: a wheel only where there is none, as a site's has its network."""
    has_mpi = is_launched() or any(map(shutil.which, ("mpicc", "mpirun", "mpiexec")))
    if not has_mpi:
        return "install MPI: pip install mpi4py mpich"
    if "mpi4py" in sys.modules:
        return (
            "load the MPI that mpi4py was built for, as by a module (there is an MPI here), or let "
            "MPI4PY_LIBMPI name its library"
        )
    return (
        "load the mpi4py that belongs to the MPI here, as by a module, or build one for it: "
        "pip install --no-binary=mpi4py mpi4py"
    )


def _may_initialize() -> bool:
    """Tell whether the program leaves the start of MPI to mpi4py; without mpi4py the start will tell."""
    try:
        import mpi4py
    except Exception:
        return True
    return bool(mpi4py.rc.initialize)


def _start(seconds: float) -> None:
    _leave_mark()
    numbers = [os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ]
    rank = f"rank {numbers[0]}" if numbers else "a rank"
    # MPI_Init keeps the interpreter's lock, so that only a signal can show where it hangs. Why it does stands
    # where the traceback has the name of the file.
    reason = (
        f"{rank} of {started() or 'several'} waited {seconds:g} s (CUPY_SYNCBN_TIMEOUT) for MPI to start: "
        "another ended, or hangs before it imports cupy_syncbn, or the launcher is not of this MPI library"
    )
    try:
        with _deadline(seconds):
            exec(compile("from mpi4py import MPI", reason, "exec"), {})
    except Exception as error:  # of any kind: a library may be missing, or unable to start
        _failure.append(error.with_traceback(None))


def _leave_mark() -> None:
    """Tell children that they are none of the ranks, whose variables they inherit."""
    if os.environ.get(_MARK, "").partition(" ")[0] != str(os.getpid()) and is_launched():
        os.environ[_MARK] = f"{os.getpid()} {_values()} {_socket()}"


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """End this process with a traceback if the context lasts longer, even in C code that keeps the lock.

    By an alarm where that can be, since faulthandler has one timer, and the program's would be lost.
    """
    if seconds > _LONGEST:
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGALRM) if is_main and hasattr(signal, "SIGALRM") else None
    if handler is None:  # another thread may set no handler, and one of C code could not be put back
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, after the traceback
    faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)
        signal.signal(signal.SIGALRM, handler)
        if left:  # the program's own alarm comes late rather than never
            signal.setitimer(signal.ITIMER_REAL, left, interval)
