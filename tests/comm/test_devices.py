"""Which of a node's GPUs is this process's; CuPy itself is not needed to tell the local rank."""

import sys

import numpy as np
import pytest

import cupy_syncbn
from cupy_syncbn import local_rank
from support.launcher import clean_environment, finish


def test_local_ranks_count_the_processes_of_a_node(world):
    ranks = np.zeros(world.size)
    ranks[world.rank] = local_rank()
    assert sorted(world.sum(ranks)) == list(range(world.size))  # the tests run on one node


@pytest.mark.mpi_skip
def test_bind_device_without_cupy_says_what_to_install():
    code = """
import sys
sys.modules["cupy"] = None  # as if it were not installed
import cupy_syncbn
try:
    cupy_syncbn.bind_device()
except ModuleNotFoundError as error:
    print(error)
"""
    process = finish([sys.executable, "-c", code], 60, env=clean_environment())
    assert "pip install 'cupy-cuda13x[ctk]' nvidia-nccl-cu13" in process.stdout, process.stderr


def test_bind_device(world, emulator, cupy):
    for count, expected in ((1, 0), (2, world.rank % 2), (world.size, world.rank), (9, world.rank)):
        emulator.devices.count = count
        assert cupy_syncbn.bind_device() == expected
        assert cupy.cuda.runtime.getDevice() == expected
        assert cupy.zeros(3).device.id == expected


def test_local_rank_counts_the_ranks_of_the_node(world, emulator, cupy, monkeypatch):
    """As on nodes of two ranks each."""
    monkeypatch.setattr(cupy_syncbn.comm.devices, "_node", lambda: f"node {world.rank // 2}")
    assert cupy_syncbn.local_rank() == world.rank % 2
    emulator.devices.count = 2
    assert cupy_syncbn.bind_device() == world.rank % 2
