"""Run the other tests under mpirun, on 1 to 4 ranks, and on 2 and 3 of a second MPI library.

CUPY_SYNCBN_TEST_OTHER_PYTHON names the Python of a virtual environment whose mpi4py uses another MPI library
than this one's, with the launcher of that library beside it.
"""

import sys
import time

import pytest

from support.launcher import clean_environment, launch, other_python, run, vendor_of

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

DEADLINE = 180

# A single rank computes as the process that runs this: what a launcher changes is how its world starts.
OF_ONE_RANK = ("tests/comm", "tests/diagnosis", "tests/nn/test_batch_norm.py")

# All tests run on three ranks of MPICH, but for what takes long and depends little on their number: NCCL's
# stand-in, the arrays of other libraries and gradients against differences run on two, torch and JAX apart.
# On four, and on ranks of Open MPI, runs what their number or the library matters to. `-m long` has more.
SUMS = (
    "tests/comm",
    "tests/test_functional.py",
    "tests/nn/test_data_parallel.py",
    "tests/nn/test_batch_norm.py",
)
"""What the number of ranks matters to."""
NO_LIBRARIES = ("--ignore=tests/test_arrays.py", "--ignore=tests/test_torch_parity.py")
INTEROP = "tests/interop"
NO_INTEROP = f"--ignore={INTEROP}"  # which has launches of its own, as it takes long
GRADIENTS = "tests/nn/test_gradcheck.py"
NO_GRADIENTS = f"--ignore={GRADIENTS}"
OF_TWO = ("tests/test_arrays.py", "tests/test_torch_parity.py", GRADIENTS)
NO_NCCL = ("--ignore-glob=tests/comm/transports/test_nccl*",)


def launch_tests(python, ranks, *arguments, deadline=DEADLINE):
    # mpi4py's runner ends all ranks when one fails; pytest fails at the first failure, before ranks part.
    command, status, output = launch(
        python,
        ranks,
        ["-m", "mpi4py", "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
         "--with-mpi", "-m", "not mpi_skip and not long", *arguments],
        deadline,
        CUPY_SYNCBN_TEST_WORLD_SIZE=str(ranks),
        CUPY_SYNCBN_TIMEOUT="60",
    )  # fmt: skip
    if status != 0:
        ended = f"did not end within {deadline} s" if status is None else f"ended with status {status}"
        pytest.fail(f"{ranks} ranks of {vendor_of(python)} {ended}: {command}\n{output}", pytrace=False)


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        pytest.param(2, (*SUMS, *OF_TWO), id="2"),
        pytest.param(3, (*NO_LIBRARIES, NO_INTEROP, *NO_NCCL, NO_GRADIENTS, "tests"), id="3"),
        pytest.param(4, (*NO_NCCL, *SUMS), id="4"),
        pytest.param(2, (NO_INTEROP, "tests"), id="2-all", marks=pytest.mark.long),
        pytest.param(4, (NO_INTEROP, "tests"), id="4-all", marks=pytest.mark.long),
    ],
)
def test_ranks(ranks, chosen):
    launch_tests(sys.executable, ranks, *chosen, deadline=400)


def test_one_rank():
    launch_tests(sys.executable, 1, *OF_ONE_RANK)


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        pytest.param(2, SUMS, id="2"),
        pytest.param(3, (*NO_NCCL, *SUMS), id="3", marks=pytest.mark.long),
        pytest.param(2, (NO_INTEROP, "tests"), id="2-all", marks=pytest.mark.long),
    ],
)
def test_ranks_of_other_mpi(ranks, chosen):
    launch_tests(other_python(), ranks, *chosen, deadline=400)


@pytest.mark.parametrize(
    ("ranks", "name", "library"),
    [
        (2, "torch", "other"),
        (3, "torch", "this"),
        (2, "jax", "this"),
        pytest.param(2, "torch", "this", marks=pytest.mark.long),
        pytest.param(3, "torch", "other", marks=pytest.mark.long),
        pytest.param(3, "jax", "this", marks=pytest.mark.long),  # each rank compiles for most of its time
        pytest.param(2, "jax", "other", marks=pytest.mark.long),
        pytest.param(3, "jax", "other", marks=pytest.mark.long),
    ],
)
def test_ranks_within_other_libraries(ranks, name, library):
    python = sys.executable if library == "this" else other_python()
    if run([python, "-c", f"import {name}"], clean_environment(), 60)[0]:
        pytest.skip(f"{name} is not installed beside {vendor_of(python)}")
    launch_tests(python, ranks, f"{INTEROP}/test_{name}.py", deadline=400)  # compilers keep the cores busy


@pytest.mark.parametrize("apart", [False, True])
def test_deadline_ends_all_descendants(apart, tmp_path):
    """A rank that hangs must not outlive its test, in a session of its own neither."""
    late = tmp_path / "late"
    command = ["sh", "-c", f"sleep 2; touch {late}"]
    code = f"import subprocess; subprocess.run({command}, start_new_session={apart})"
    status, output = run([sys.executable, "-c", code], clean_environment(), 1)
    assert status is None
    assert f"touch {late}" in output or "no ps" in output  # what was left
    time.sleep(1.5)
    assert not late.exists()


def test_wrong_number_of_ranks_is_an_error():
    """Otherwise a launcher that starts separate worlds would pass everything."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/comm"]
    status, output = run(command, clean_environment(CUPY_SYNCBN_TEST_WORLD_SIZE="5"), 60)
    assert status == 3, output
    assert "expected 5 ranks" in output


def test_ranks_without_the_plugins_option_are_an_error():
    """Otherwise pytest-mpi would skip what takes several ranks."""
    arguments = [
        "-m",
        "mpi4py",
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        "tests/comm",
    ]
    _, status, output = launch(sys.executable, 2, arguments, 60)
    assert status != 0
    assert "ranks take --with-mpi" in output
