"""What the tests run in: one process or the ranks that `mpirun` started, with a GPU or a stand-in for it.

Every test is valid for any number of ranks, all of which run the same tests in the same order and draw the
same random numbers. pytest-mpi's marks tell the others: `mpi_skip` gains nothing from ranks, and
test_under_mpirun.py leaves it out; `mpi(min_size=2)` has nothing to test on one.

Tests of the CUDA engine take the fixture `cupy`: CuPy itself where it sees a GPU, else the stand-in of
`cuda_emulator`. With CUPY_SYNCBN_REQUIRE_GPU=1 it is CuPy or a failure.
"""

import functools
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.register_assert_rewrite("support")

from support.world import World  # noqa: E402

# Layers are of NumPy unless a test says otherwise, on a machine with a GPU too.
os.environ["CUPY_SYNCBN_DEVICE"] = "cpu"
# Where one of these says so, pytest prints all of a difference: for long lists that takes hours.
for variable in "CI", "BUILD_NUMBER":
    os.environ.pop(variable, None)
# JAX would make its arrays on a GPU, most of whose memory it takes for itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

OF_LAYERS = {"interop", "nn", "test_plan.py"}

REQUIRE_GPU = os.environ.get("CUPY_SYNCBN_REQUIRE_GPU") == "1"


def pytest_addoption(parser):
    parser.addoption("--fuzz-cases", type=int, help="cases that test_fuzz.py draws for each engine")


def pytest_ignore_collect(collection_path):
    """Do not even import, on ranks, a module that is left out as a whole."""
    if World().size > 1 and collection_path.match("test_*.py"):
        return bool(re.search(r"^pytestmark = .*mpi_skip", collection_path.read_text(), re.MULTILINE)) or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "mpi" in item.keywords and not item.get_closest_marker("mpi"):
            raise pytest.UsageError(f"{item.nodeid}: pytest-mpi takes this id or name for its mark")
        # Of layers and modules, what asks for no ranks computes on each rank as in one process.
        if OF_LAYERS & {*item.path.parts, item.path.name} and "world" not in item.fixturenames:
            item.add_marker("mpi_skip")


def pytest_sessionstart(session):
    # An mpirun of another MPI library starts that many worlds of one rank, in which all would pass as well.
    expected = os.environ.get("CUPY_SYNCBN_TEST_WORLD_SIZE")
    size = World().size
    if expected is not None and size != int(expected):
        pytest.exit(f"expected {expected} ranks, got {size}: is this the mpirun of this Python's MPI?", 3)
    if size > 1 and not session.config.getoption("--with-mpi"):
        pytest.exit('ranks take --with-mpi -m "not mpi_skip and not long"', 3)
    if size > 1:
        # At its end pytest deletes what earlier runs left, and stumbles where another rank is at it too.
        root = Path(tempfile.gettempdir(), f"pytest-of-rank-{World().rank}-{os.getuid()}")
        root.mkdir(exist_ok=True, mode=0o700)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(root)
    from cupy_syncbn.backends.cpu import loading

    if loading.choice().core is None:
        # Programs that tests start take NumPy on purpose then: else each would log why, where a test reads.
        os.environ.setdefault("CUPY_SYNCBN_ISA", "numpy")


def pytest_report_header():
    from cupy_syncbn.backends.cpu import loading

    return f"NumPy arrays: {loading.status()}"


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture
def rng():
    """Return a generator that draws the same numbers on all ranks."""
    return np.random.default_rng(2020)


@functools.cache
def real_cupy():
    """Return CuPy if it sees a GPU, else None."""
    try:
        import cupy
    except ModuleNotFoundError:
        return None
    return cupy if cupy.cuda.is_available() else None


@functools.cache
def emulated_cupy(mode):
    import cuda_emulator
    from support.emulated import make_emulated_cupy
    from support.missing import skip_without

    skip_without(cuda_emulator.available())
    return make_emulated_cupy(mode)


def _use(monkeypatch, mode):
    """Install a CuPy for the duration of a test, and return it."""
    from cupy_syncbn import arrays

    found = real_cupy()
    if found is None and REQUIRE_GPU:
        pytest.fail("CUPY_SYNCBN_REQUIRE_GPU is set, but CuPy sees no GPU")
    if found is None:
        import cuda_emulator

        found = emulated_cupy(mode)
        for name, module in (("", found), (".cuda", found.cuda), (".cuda.runtime", found.cuda.runtime)):
            monkeypatch.setitem(sys.modules, "cupy" + name, module)
        cuda_emulator.devices.attributes["MultiProcessorCount"] = 2  # small grids are quick
    arrays.why_no_gpu.cache_clear()
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    monkeypatch.setattr(cuda_operations, "cupy", found)
    cuda_operations.forget()
    return found


@pytest.fixture
def cupy(monkeypatch):
    """Return CuPy on a GPU, or the stand-in, whose kernels check every access to memory."""
    yield _use(monkeypatch, "checked")
    _forget()


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Return the device of each engine in turn."""
    if request.param == "cuda":
        request.getfixturevalue("cupy")
    return request.param


@pytest.fixture
def xp(device, request):
    """Return the array library of the device."""
    return np if device == "cpu" else request.getfixturevalue("cupy")


@pytest.fixture
def fast_cupy(monkeypatch):
    """Return the same without the checks, for larger data."""
    yield _use(monkeypatch, "fast")
    _forget()


@pytest.fixture
def emulator(world, cupy):
    """Return the emulator, as a node with a GPU for each rank, which is its current device."""
    if "StandIn" not in type(cupy).__name__:
        pytest.skip("there is no emulator beside a real GPU")
    import cuda_emulator

    cuda_emulator.devices.count = world.size
    cupy.cuda.Device(world.rank).use()
    yield cuda_emulator
    cupy.cuda.Device(0).use()
    cuda_emulator.devices.count = 1


@pytest.fixture
def streams(emulator):
    """Let streams work late, and count how often the host waits for them."""
    found = emulator.streams
    found.at_once = False
    found.synchronizations.clear()
    yield found
    found.at_once = True
    found.finish_all()  # the groups are gone now


@pytest.fixture
def nccl(monkeypatch, streams, cupy):
    """Return the stand-in for NCCL."""
    from mpi4py import MPI

    from support import nccl_stand_in

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("this MPI may not be called by several threads")
    return nccl_stand_in.install(monkeypatch, cupy)


def _forget():
    from cupy_syncbn import arrays
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    arrays.why_no_gpu.cache_clear()
    cuda_operations.forget()
