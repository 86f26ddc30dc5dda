"""How tests start processes, and MPI ranks with the launcher of this Python's MPI library or of another's."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        cwd=REPOSITORY, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        left = processes_of(process.pid)  # whether a rank hangs, or the launcher alone
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, f"{output}\n{left}"
    return process.returncode, output


def processes_of(session):
    """Describe the processes of a session, with what each waits for."""
    command = ["ps", "-o", "pid,ppid,stat,etimes,wchan:20,args", "--forest", "-s", str(session)]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return "there is no ps to tell which processes are left"


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
    """Return the Python with another MPI library; skip the test if there is none, but not in CI."""
    python = os.environ.get(OTHER_PYTHON)
    if not python:
        reason = f"{OTHER_PYTHON} names no Python with another MPI library"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
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
