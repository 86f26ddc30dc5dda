"""The kernels are compiled while other tests run, in what time they leave to the processors."""

import importlib.util
import itertools

import pytest

import cuda_emulator
from cupy_syncbn.backends.cuda import kernels
from support import nvrtc
from support.ahead import start_pool
from support.world import World

POOL = pytest.StashKey()
RESULTS = pytest.StashKey()


def pytest_collection_modifyitems(items):
    """Put files that wait for the emulator's compiler behind others, and then what waits for NVRTC."""
    if World().size == 1:
        waits = {}
        for item in items:
            waits[item.path] = max(_wait(item), waits.get(item.path, 0))
        items.sort(key=lambda item: waits[item.path])


def _wait(item):
    fixtures = getattr(item, "fixturenames", ())
    if "compilations" in fixtures:
        return 3
    if "cupy" in fixtures:
        return 2
    return int(item.path.name == "test_under_mpirun.py")  # the longest, beside which the others find room


def pytest_collection_finish(session):
    if session.config.option.collectonly or World().size > 1:
        return
    session.stash[POOL] = pool = start_pool()
    for library in _emulators_libraries(session.items):
        pool.submit(cuda_emulator.build_all, [library])  # a test that needs one finds it, or the error
    session.stash[RESULTS] = {job: pool.submit(nvrtc.prepare, job) for job in _nvrtcs_jobs(session.items)}


def _emulators_libraries(items):
    """Yield what the tests that were chosen will have compiled by g++."""
    if importlib.util.find_spec("cupy") or cuda_emulator.available():
        return
    modes = {
        "checked": any(item.name.startswith("test_instance[") for item in items),
        "fast": any("fast_cupy" in getattr(item, "fixturenames", ()) for item in items),
    }
    for mode, file, dtype in itertools.product(modes, kernels.FILES, kernels.TYPES):
        if modes[mode]:
            yield kernels.source(file), kernels.instances(file, dtype), (), mode


def _nvrtcs_jobs(items):
    if nvrtc.missing():
        return []
    chosen = [item.callspec.params for item in items if "compilations" in getattr(item, "fixturenames", ())]
    return [job for each in chosen for job in nvrtc.jobs_of(each["file"], each["architecture"])]


@pytest.fixture(scope="session")
def compilations(request):
    """Return the futures of all jobs of the tests that were chosen."""
    return request.session.stash[RESULTS]


def pytest_sessionfinish(session):
    if pool := session.stash.get(POOL, None):
        pool.shutdown(cancel_futures=True)
