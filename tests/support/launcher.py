"""How tests start processes, and MPI ranks with the launcher of this Python's MPI library or of another's."""

import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.missing import skip_without

REPOSITORY = Path(__file__).parents[2]
TESTS = REPOSITORY / "tests"

OTHER_PYTHON = "CUPY_SYNCBN_TEST_OTHER_PYTHON"

# By vendor: what allows more ranks than cores.
OVERSUBSCRIBE = {"Open MPI": ["--oversubscribe"]}


def clean_environment(**variables):
    """Return the environment without what an MPI launcher or MPI_Init added to it, for a child process."""
    launchers = (
        "OMPI_COMM_", "OMPI_MCA_ess", "PMI_", "PMIX_", "PRTE_", "MV2_COMM_", "MVP_COMM_", "PALS_", "HYDI_",
        "SLURM_STEP_", "SLURM_PROCID", "_CUPY_SYNCBN_RANK",
    )  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | variables


def run(command, environment, deadline):
    """Run a command; return its exit status, None after the deadline, and all its output."""
    try:
        done = finish(command, deadline, env=environment, cwd=REPOSITORY, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as late:
        return None, late.output
    return done.returncode, done.stdout


def finish(command, deadline, *, env=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options):
    """Do as `subprocess.run` of text, but after the deadline end all that the command started.

    `subprocess.run` ends the command alone, and then waits for what holds its pipes: for ever, if that hangs.
    """
    mark = f"_CUPY_SYNCBN_TEST_{secrets.token_hex(8)}=1"  # also of those that went into sessions of their own
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        command, env={**(os.environ if env is None else env), name: value}, stdout=stdout, stderr=stderr,
        encoding="utf-8", errors="replace", start_new_session=True, **options,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired as late:
        found = marked(mark)
        left = describe(found)  # whether a rank hangs, or the launcher alone
        while found:  # some may start others meanwhile
            for each in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            time.sleep(0.05)
            process.poll()
            found = marked(mark)
        output, errors = process.communicate()
        late.output, late.stderr = f"{output}\n{left}", errors
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def marked(mark):
    """Return the processes whose environment had this when they started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def describe(processes):
    """Describe processes, with what each waits for."""
    command = ["ps", "-ww", "-o", "pid,ppid,stat,etimes,wchan:20,args", "--forest"]
    try:
        done = subprocess.run(
            [*command, *(f"-p{each}" for each in processes)], capture_output=True, text=True, timeout=30
        )
    except FileNotFoundError:
        return "there is no ps to tell which processes are left"
    return done.stdout


def find_launcher(python):
    beside = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    launcher = shutil.which("mpirun", path=beside) or shutil.which("mpiexec", path=beside)
    assert launcher, f"neither mpirun nor mpiexec beside {python} or on the PATH"
    return launcher


@functools.cache
def vendor_of(python):
    # MPI is not started: not every library can be without its launcher.
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
    status, output = run([python, "-c", code], clean_environment(), 60)
    assert status == 0, output
    return output.strip().splitlines()[-1]


@functools.cache
def label_of(python):
    """Return the option that writes a rank's number before its output."""
    if vendor_of(python) != "Open MPI":
        return ["-l"]
    _, version = run([find_launcher(python), "--version"], clean_environment(), 60)
    return ["--tag-output"] if re.search(r"Open MPI\)? [1-4]\.", version) else ["--output", "tag"]


def other_python():
    """Return the Python with another MPI library."""
    python = os.environ.get(OTHER_PYTHON)
    skip_without(not python and f"{OTHER_PYTHON} names no Python with another MPI library")
    assert vendor_of(python) != vendor_of(sys.executable), f"{OTHER_PYTHON} has the same MPI library"
    return python


def launch(python, ranks, arguments, deadline, *options, **variables):
    """Run Python on some ranks; return the command, its exit status (None after the deadline), its output."""
    vendor = vendor_of(python)
    environment = clean_environment(
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(filter(None, [str(REPOSITORY), str(TESTS), os.environ.get("PYTHONPATH")])),
        **variables,
    )
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [
        find_launcher(python), *OVERSUBSCRIBE.get(vendor, []), *label_of(python), *options,
        "-n", str(ranks), python, *arguments,
    ]  # fmt: skip
    return " ".join(command), *run(command, environment, deadline)
