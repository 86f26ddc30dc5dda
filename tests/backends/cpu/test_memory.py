"""Outputs begin on cache lines, and their memory is used again, up to a limit."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupy_syncbn import SingleProcessGroup, sync_batch_norm
from cupy_syncbn.backends.cpu import memory
from cupy_syncbn.backends.cpu.memory import output
from support.arrays import BFLOAT16, random_array
from support.compare import assert_identical

pytestmark = pytest.mark.mpi_skip

MIB = 1 << 20
FLOAT32 = np.dtype("f4")


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory._free.clear()
    yield
    memory._free.clear()


def kept_bytes():
    return sum(buffer.size for buffer in memory._free)


@pytest.mark.parametrize("dtype", [np.dtype("f8"), FLOAT32, np.dtype("f2"), BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (64, 33, 129), (1, 1 << 17, 1), (0, 5, 7)], ids=str)
def test_output(shape, dtype):
    for _ in range(3):  # made, and used again
        array = output(shape, dtype)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        if array.nbytes >= memory.SMALL:
            assert array.ctypes.data % memory.CACHE_LINE == 0
        array[...] = 1
        del array


def test_released_outputs_are_used_again(rng):
    x, alone = random_array(rng, (8, 64, 100)), SingleProcessGroup()
    y, _ = sync_batch_norm(x, process_group=alone)
    expected, address = y.copy(), y.ctypes.data
    part = y[3:, ::2]
    del y, _
    z, _ = sync_batch_norm(x + 1, process_group=alone)
    assert not np.shares_memory(z, part)  # a view keeps the memory of the whole
    assert_identical(part, expected[3:, ::2])
    del part
    z, _ = sync_batch_norm(x, process_group=alone)
    assert z.ctypes.data == address


def test_the_last_released_is_the_first_used():
    first, second = (output((1, 1, MIB), FLOAT32) for _ in range(2))
    addresses = first.ctypes.data, second.ctypes.data
    del first
    del second
    again = [output((1, 1, MIB), FLOAT32) for _ in range(2)]
    assert (again[1].ctypes.data, again[0].ctypes.data) == addresses


def test_few_are_kept():
    held = [output((1, 1, size << 16), FLOAT32) for size in range(1, 20)]
    sizes = [array.nbytes for array in held]
    while held:
        del held[0]
        assert len(memory._free) <= memory.KEPT_OUTPUTS
    assert [buffer.size - memory.CACHE_LINE for buffer in memory._free] == sizes[-memory.KEPT_OUTPUTS :]


# Memory of the operating system that nobody writes to is none.
@pytest.mark.parametrize(
    ("mib", "number"), [(32, 4), (64, 4), (80, 3), (98, 3), (128, 2), (256, 1), (319, 1), (320, 0), (400, 0)]
)
def test_all_that_is_kept_has_a_limit(mib, number):
    """A float32 output of 2x64x256x256 has 32 MiB, and a cache line."""
    held = [output((1, 1, mib * MIB // 4), FLOAT32) for _ in range(5)]
    addresses = {array.ctypes.data for array in held}
    while held:
        held.pop()
        assert kept_bytes() <= memory.KEPT_BYTES
    assert len(memory._free) == number
    again = [output((1, 1, mib * MIB // 4), FLOAT32) for _ in range(number)]
    assert {array.ctypes.data for array in again} <= addresses
    assert not memory._free


def test_one_that_is_too_large_leaves_the_others():
    small, large = output((1, 1, MIB), FLOAT32), output((1, 1, 100 * MIB), FLOAT32)
    del small
    del large
    assert [buffer.size for buffer in memory._free] == [4 * MIB + memory.CACHE_LINE]


def test_a_size_does_not_take_anothers_memory():
    sizes = [MIB + 64 * i for i in range(4)]
    held = [output((1, 1, size), FLOAT32) for size in sizes]
    addresses = {array.size: array.ctypes.data for array in held}
    held.clear()
    del held
    for size in sizes:
        array = output((1, 1, size), FLOAT32)
        assert array.ctypes.data == addresses[size]


def test_threads():
    """Each has its outputs for itself, whoever else takes and releases some."""

    def work(number):
        for i in range(300):
            arrays = [output((1, 1, 40_000 + 16 * (number % 3)), FLOAT32) for _ in range(1 + i % 3)]
            for k, array in enumerate(arrays):
                array[...] = 3 * number + k
            for k, array in enumerate(arrays):
                assert (array == 3 * number + k).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert len(memory._free) <= memory.KEPT_OUTPUTS
