"""Run the tests of groups and layers on ranks of Debian's MPI libraries, with older releases of mpi4py.

It takes some minutes, Debian's packages of the libraries, and a network, as pip builds mpi4py for them.
"""

import os
import shutil
import subprocess
import sys

import pytest

from support.launcher import REPOSITORY, TESTS, clean_environment, run

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip, pytest.mark.long]

DEADLINE = 300
PACKAGES = {"openmpi": "openmpi-bin and libopenmpi-dev", "mpich": "mpich and libmpich-dev"}
OPTIONS = {"openmpi": ["--oversubscribe"], "mpich": []}
CHOSEN = ("comm/test_groups.py", "comm/test_devices.py", "nn/test_batch_norm.py", "nn/test_data_parallel.py")


@pytest.fixture(
    scope="module", params=[("openmpi", "3.1.6"), ("mpich", "3.1.6"), ("mpich", "4.0.3")], ids="-".join
)
def debian(request, tmp_path_factory):
    """Return the launcher, and the environment in which this Python finds the mpi4py of that library."""
    library, version = request.param
    launcher, compiler = (shutil.which(f"{name}.{library}") for name in ("mpirun", "mpicc"))
    if not launcher or not compiler:
        pytest.skip(f"no mpirun.{library} or mpicc.{library}: install Debian's {PACKAGES[library]}")
    folder = tmp_path_factory.mktemp("mpi4py")
    (folder / "constraints").write_text("setuptools<70\n" if version.startswith("3") else "")
    # Not by the pip of this environment, which would find the headers of an MPI library that is a wheel; nor
    # from its cache, which does not tell builds for two libraries apart.
    subprocess.run([sys._base_executable, "-m", "venv", folder / "venv"], check=True, timeout=100)
    command = [
        str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps",
        "--no-cache-dir", "--no-binary=mpi4py", f"--target={folder / library}", f"mpi4py=={version}",
    ]  # fmt: skip
    building = {"MPICC": compiler, "CFLAGS": "-O0", "PIP_CONSTRAINT": str(folder / "constraints")}
    status, output = run(command, clean_environment(**building), DEADLINE)
    if status != 0:
        pytest.skip(f"mpi4py {version} cannot be built for Debian's {library}: {output[-1000:]}")
    environment = clean_environment(
        PYTHONPATH=os.pathsep.join(map(str, (folder / library, REPOSITORY, TESTS))),
        OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", CUPY_SYNCBN_TIMEOUT="60",
    )  # fmt: skip
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [launcher, *OPTIONS[library]], environment, version


def run_ranks(debian, ranks, *arguments, **variables):
    launcher, environment, _ = debian
    command = [*launcher, "-n", str(ranks), sys.executable, "-m", "mpi4py", *arguments]
    return run(command, environment | variables, DEADLINE)


@pytest.mark.parametrize("ranks", [2, 3])
def test_groups_and_layers(debian, ranks):
    status, output = run_ranks(
        debian, ranks, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--with-mpi", "--color=no",
        "-m", "not mpi_skip and not long", *[str(TESTS / name) for name in CHOSEN],
        CUPY_SYNCBN_TEST_WORLD_SIZE=str(ranks),
    )  # fmt: skip
    assert status == 0, output
    assert output.count(" passed") == ranks


def test_report(debian):
    status, output = run_ranks(debian, 3, "-m", "cupy_syncbn")
    assert status == 0, output
    assert f"mpi4py {debian[2]}" in output
    assert "self-test on 3 ranks, device cpu: passed" in output


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("missing_file", "FileNotFoundError"),
        ("leaves_early", "CollectiveTimeoutError"),
        ("never_imports", "(CUPY_SYNCBN_TIMEOUT) for MPI to start"),
        ("children", "trained as 1 of 2"),
        ("rc_initialize", "trained as 1 of 2"),
        ("rc_thread_level", "trained as 1 of 2"),
    ],
)
def test_start(debian, name, outcome):
    program = str(TESTS / "comm" / "start_cases.py")
    timeout = "3" if name in ("leaves_early", "never_imports") else "60"
    status, output = run_ranks(debian, 2, program, name, CUPY_SYNCBN_TIMEOUT=timeout)
    assert status is not None, output
    assert (status == 0) == outcome.startswith("trained"), output
    assert outcome in output
