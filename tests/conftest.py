"""The world that the tests run in: one process, or the ranks that `mpirun` started.

Every test is valid for any number of ranks, all of which run the same tests in the same order and draw the
same random numbers. Tests marked `serial` gain nothing from more ranks: test_launch.py leaves them out.
"""

import os

import numpy as np
import pytest

pytest.register_assert_rewrite("helpers")

from helpers import World  # noqa: E402


def pytest_collection_modifyitems(config, items):
    if World().size > 1:
        launches = [item for item in items if item.get_closest_marker("launch")]
        config.hook.pytest_deselected(items=launches)
        items[:] = [item for item in items if item not in launches]


def pytest_sessionstart():
    # An mpirun of another MPI library starts that many worlds of one rank, in which all would pass as well.
    expected = os.environ.get("CUPY_SYNCBN_TEST_WORLD_SIZE")
    size = World().size
    if expected is not None and size != int(expected):
        pytest.exit(f"expected {expected} ranks, got {size}: is this the mpirun of this Python's MPI?", 3)


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture
def rng():
    """Return a generator that draws the same numbers on all ranks."""
    return np.random.default_rng(2020)
