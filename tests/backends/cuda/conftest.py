"""NVRTC compiles while other tests run, in what time they leave to the processors."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from support import nvrtc

POOL = pytest.StashKey()
RESULTS = pytest.StashKey()


def pytest_collection_modifyitems(items):
    """Put what waits for NVRTC behind all other tests."""
    items.sort(key=lambda item: "compilations" in getattr(item, "fixturenames", ()))


def pytest_collection_finish(session):
    if session.config.option.collectonly or nvrtc.missing():
        return
    chosen = [item for item in session.items if "compilations" in getattr(item, "fixturenames", ())]
    jobs = [
        job
        for item in chosen
        for job in nvrtc.jobs_of(item.callspec.params["file"], item.callspec.params["architecture"])
    ]
    # On Linux, which NVRTC's wheels are for, a thread is nice by itself.
    session.stash[POOL] = pool = ThreadPoolExecutor(os.cpu_count(), initializer=os.nice, initargs=[19])
    session.stash[RESULTS] = {job: pool.submit(nvrtc.compile_job, job) for job in jobs}


@pytest.fixture(scope="session")
def compilations(request):
    """Return the futures of all jobs of the tests that were chosen."""
    return request.session.stash[RESULTS]


def pytest_sessionfinish(session):
    if pool := session.stash.get(POOL, None):
        pool.shutdown(cancel_futures=True)
