"""Run the other tests under mpirun, with 1 to 4 ranks, and under a second MPI library.

CUPY_SYNCBN_TEST_OTHER_PYTHON names the Python of a virtual environment whose mpi4py uses another MPI library
than this one's, with the launcher of that library beside it.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

pytestmark = pytest.mark.launch

DEADLINE = 180
OTHER_PYTHON = "CUPY_SYNCBN_TEST_OTHER_PYTHON"

# By vendor: what allows more ranks than cores, and what writes a rank's number before its output.
OVERSUBSCRIBE = {"Open MPI": ["--oversubscribe"]}
LABEL = {"Open MPI": ["--output", "tag"], "MPICH": ["-l"], "Intel MPI": ["-l"]}


def run(command, environment, deadline):
    """Run a command; return its exit status, None after the deadline, and all its output."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        cwd=REPOSITORY, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def find_launcher(python):
    beside = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    launcher = shutil.which("mpirun", path=beside) or shutil.which("mpiexec", path=beside)
    assert launcher, f"neither mpirun nor mpiexec beside {python} or on the PATH"
    return launcher


def vendor_of(python):
    code = "from mpi4py import MPI; print(MPI.get_vendor()[0])"
    status, output = run([python, "-c", code], clean_environment(), 60)
    assert status == 0, output
    return output.strip().splitlines()[-1]


def launch(python, ranks):
    vendor = vendor_of(python)
    environment = clean_environment(
        CUPY_SYNCBN_TEST_WORLD_SIZE=str(ranks),
        CUPY_SYNCBN_TIMEOUT="60",
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    )
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # mpi4py's runner ends all ranks when one fails; pytest fails at the first failure, before ranks part.
    command = [
        find_launcher(python), *OVERSUBSCRIBE.get(vendor, []), *LABEL.get(vendor, []), "-n", str(ranks),
        python, "-m", "mpi4py", "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
        "-m", "not launch and not serial", "tests",
    ]  # fmt: skip
    status, output = run(command, environment, DEADLINE)
    if status != 0:
        ended = f"did not end within {DEADLINE} s" if status is None else f"ended with status {status}"
        pytest.fail(f"{ranks} ranks of {vendor} {ended}: {' '.join(command)}\n{output}", pytrace=False)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks(ranks):
    launch(sys.executable, ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_other_mpi(ranks):
    python = os.environ.get(OTHER_PYTHON)
    if not python:
        reason = f"{OTHER_PYTHON} names no Python with another MPI library"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    assert vendor_of(python) != vendor_of(sys.executable), f"{OTHER_PYTHON} has the same MPI library"
    launch(python, ranks)


def test_deadline_ends_all_descendants(tmp_path):
    """A rank that hangs must not outlive its test."""
    late = tmp_path / "late"
    code = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 3; touch {late}'])"
    status, output = run([sys.executable, "-c", code], clean_environment(), 1)
    assert status is None
    assert output == ""
    subprocess.run(["sleep", "3"], check=True)
    assert not late.exists()


def test_wrong_number_of_ranks_is_an_error():
    """Otherwise a launcher that starts separate worlds would pass everything."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests"]
    status, output = run(command, clean_environment(CUPY_SYNCBN_TEST_WORLD_SIZE="5"), 60)
    assert status == 3, output
    assert "expected 5 ranks" in output
