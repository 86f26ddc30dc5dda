"""The stand-in for NCCL finds what it is for."""

import contextlib

import numpy as np
import pytest

from support import nccl_stand_in
from support.transports import share_gpus


@contextlib.contextmanager
def communicator(world, nccl):
    unique_id = world.comm.bcast(nccl.get_unique_id() if world.rank == 0 else None)
    made = nccl.NcclCommunicator(world.size, unique_id, world.rank)
    yield made
    made.abort()


def all_reduce(nccl, communicator, buffer, **changes):
    arguments = {"count": buffer.size, "datatype": nccl.NCCL_FLOAT64, "op": nccl.NCCL_SUM, "stream": 0}
    arguments |= changes
    communicator.allReduce(buffer.data.ptr, buffer.data.ptr, *arguments.values())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "changes", [{"count": 2}, {"datatype": "NCCL_INT64"}, {"call": "broadcast"}], ids=lambda c: next(iter(c))
)
def test_stand_in_hangs_where_ranks_differ(world, cupy, nccl, changes):
    buffer = cupy.ones(3)
    with communicator(world, nccl) as made:
        if world.rank == 1 and "call" in changes:
            made.broadcast(buffer.data.ptr, buffer.data.ptr, 3, nccl.NCCL_FLOAT64, 0, 0)
        else:
            changes = changes if world.rank == 1 and "call" not in changes else {}
            all_reduce(nccl, made, buffer, **{k: getattr(nccl, str(v), v) for k, v in changes.items()})
        event = cupy.cuda.Event()
        event.record()
        for _ in range(100):
            assert not event.done
        made.abort()
        assert event.done
        assert np.isnan(buffer.get()).any()


def test_stand_in_does_nothing_at_the_call(world, cupy, nccl):
    buffer = cupy.ones(3)
    with communicator(world, nccl) as made:
        cupy.cuda.get_current_stream().synchronize()
        all_reduce(nccl, made, buffer)
        assert (buffer._array == 1).all()
        assert (buffer.get() == world.size).all()


def test_stand_in_refuses(world, emulator, cupy, nccl):
    x = cupy.ones(3)
    with communicator(world, nccl) as made:
        emulator.devices.count = world.size + 1
        with cupy.cuda.Device(world.size):
            elsewhere = cupy.ones(3)
        for buffer, changes in ((x, {"count": 4}), (x, {"op": 9}), (x, {"datatype": 77}), (elsewhere, {})):
            with pytest.raises(nccl.NcclError, match="INVALID_ARGUMENT"):
                all_reduce(nccl, made, buffer, **changes)
        all_reduce(nccl, made, cupy.empty(3))
        with pytest.raises(emulator.EmulatorError, match="nothing has written"):
            cupy.cuda.get_current_stream().synchronize()
        with pytest.raises(emulator.EmulatorError, match="where its ranks may wait"):
            made.destroy()
        made.abort()
        for use in made.size, made.check_async_error, lambda: all_reduce(nccl, made, x):
            with pytest.raises(nccl.NcclError, match="INVALID_ARGUMENT"):
                use()
    if world.size > 1:
        with pytest.MonkeyPatch.context() as patch:
            share_gpus(world, patch, cupy)
            with pytest.raises(nccl.NcclError, match="INVALID_USAGE"), communicator(world, nccl):
                pass


@pytest.mark.mpi_skip
def test_stand_in_has_the_names_of_cupy():
    pytest.importorskip("cupy")
    from cupy.cuda import nccl as real

    if not real.available:
        pytest.skip("CuPy has no NCCL")
    stand_in = nccl_stand_in.make_nccl()
    for name, value in vars(stand_in).items():
        if not name.startswith("_"):
            assert hasattr(real, name)
            assert not name.startswith("NCCL_") or value == getattr(real, name)
    for name in vars(stand_in.NcclCommunicator):
        assert name.startswith("_") or hasattr(real.NcclCommunicator, name)
