"""CuPy arrays that travel through pinned memory of the host."""

import numpy as np
import pytest

from cupy_syncbn import RemoteRankError, SyncBatchNorm, new_group
from cupy_syncbn.comm import transports
from support.arrays import random_array, random_batch
from support.transports import SHAPE


def host_staged(**arguments):
    return new_group(transport="mpi", **arguments)


def test_pinned_memory_is_used_again(emulator, cupy, streams):
    """Once for each stream, and again when more is needed; groups share it."""
    pinned = emulator.pinned
    transports.host_staged._pinned.clear()

    def allocations(sizes):
        before = pinned.allocations
        for size in sizes:
            host_staged().allreduce(cupy.zeros(size))
        return pinned.allocations - before

    assert allocations([100] * 3 + [7, 100]) == 1
    assert allocations([1000] * 3 + [100]) == 1
    with cupy.cuda.Stream():
        assert allocations([100] * 3) == 1
    assert allocations([1000]) == 0


def test_streams_share_no_pinned_memory(world, cupy, streams):
    """The copy back on one stream may still be under way when the other copies out."""
    group = host_staged()
    pair = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    sums = []
    for step in range(3):
        for number, stream in enumerate(pair):
            with stream:
                buffer = cupy.full(50 + 1000 * step, 10.0 * step + number)
                group.allreduce(buffer)  # the second time with larger memory, while the smaller is read
                sums.append((buffer, (10 * step + number) * world.size))
    cupy.cuda.Device().synchronize()
    for buffer, expected in sums:
        assert (buffer.get() == expected).all()


def test_sum_is_in_memory_of_the_host(world, cupy, streams):
    group = host_staged()
    buffer = cupy.full((2, 3), 1.5)
    returned = group.allreduce(buffer)
    assert isinstance(returned, np.ndarray)
    assert (returned == 1.5 * world.size).all()
    assert returned.shape == (2, 3)


def test_host_waits_once_an_exchange(world, rng, cupy, streams):
    layer = SyncBatchNorm(4, device="cuda", process_group=host_staged())
    x = cupy.asarray(random_array(rng, SHAPE))
    layer(x)
    layer.forget()
    streams.synchronizations.clear()
    layer(x)
    layer.backward(x)
    assert len(streams.synchronizations) == (2 if world.size > 1 else 0)


@pytest.mark.mpi(min_size=2)
def test_no_memory_for_the_vector_that_tells_of_it(world, rng, cupy, streams, monkeypatch):
    layer = SyncBatchNorm(4, device="cuda", process_group=new_group(transport="mpi", timeout=9), name="stem")
    x = cupy.asarray(random_batch(rng, SHAPE))
    layer(x)

    def none_left(*arguments, **options):
        raise MemoryError("none left")

    own, others = (MemoryError, "none left"), (RemoteRankError, "rank 1 failed before forward")
    error, match = own if world.rank == 1 else others
    with monkeypatch.context() as patch:
        if world.rank == 1:
            for name in "empty", "zeros", "asarray", "array":
                patch.setattr(cupy, name, none_left)
        with pytest.raises(error, match=match):
            layer(x)
    layer(x)
