"""CuPy arrays whose addresses MPI takes."""

import numpy as np
import pytest

from cupy_syncbn import MPIProcessGroup, RankMismatchError, SyncBatchNorm, new_group
from cupy_syncbn.comm.schedules import Schedule
from support.arrays import random_batch
from support.transports import SHAPE


@pytest.mark.parametrize("call", ["allreduce", "broadcast", "allreduce_checked"])
def test_stream_has_ended_when_mpi_reads(world, cupy, streams, call):
    """MPI gets the address: what the stream has not written yet, it would not see."""
    group = new_group(transport="cuda-aware-mpi")
    staging = np.frombuffer(cupy.cuda.alloc_pinned_memory(80), "f8", 10)
    staging[:] = 1
    buffer = cupy.zeros(10)
    with cupy.cuda.Stream() as stream:
        buffer.set(staging)
        assert stream._under_way()
        getattr(group, call)(buffer)
        assert (buffer.get() == (1 if call == "broadcast" else world.size)).all()


class BetweenTwoRanks:
    """A communicator whose other functions may not take addresses on the GPU, as in Open MPI."""

    def __init__(self, comm, cupy):
        self._comm, self._cupy = comm, cupy

    def __getattr__(self, name):
        def call(*arguments, **keywords):
            on_gpu = any(isinstance(argument, self._cupy.ndarray) for argument in arguments)
            assert not on_gpu or name in ("Isend", "Irecv"), f"{name} of an address on the GPU"
            return getattr(self._comm, name)(*arguments, **keywords)

        return call


def test_addresses_go_into_messages_between_two_ranks(world, rng, cupy, streams):
    group = new_group(transport="cuda-aware-mpi")
    private = group._opened()
    private.comm = BetweenTwoRanks(private.comm, cupy)
    layer = SyncBatchNorm(4, device="cuda", process_group=group)
    x = cupy.asarray(random_batch(rng, SHAPE))
    layer(x)
    layer.backward(x)
    for buffer in cupy.ones(3), cupy.ones(3, "float16"):
        group.broadcast(buffer)
        group.allreduce(buffer)
        assert (buffer.get() == world.size).all()


@pytest.mark.mpi(min_size=2)
def test_sizes_that_differ(world, cupy, streams):
    group = MPIProcessGroup(world.comm.Dup(), transport="cuda-aware-mpi")
    buffer = cupy.ones(10 + (world.rank % 2))
    if world.size == 2:
        with pytest.raises(RankMismatchError, match="different sizes"):
            group.allreduce(buffer)


@pytest.fixture
def lanes(monkeypatch):
    monkeypatch.setattr(Schedule, "halvings", lambda self, nbytes: len(self.crossing) if nbytes > 40 else 0)


def group_on_nodes(world):
    """Return a group whose ranks take themselves to be two on each node."""
    group = MPIProcessGroup(world.comm.Dup(), transport="cuda-aware-mpi", timeout=20)
    group.host = f"node {world.rank // 2}"
    return group


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_sums_by_lanes(world, rng, cupy, streams, lanes, dtype):
    group = group_on_nodes(world)
    for size in 5, 6, 100, 1001:
        everyones = rng.integers(0, 50, (world.size, size)).astype(dtype)
        buffer = cupy.asarray(everyones[world.rank])
        group.allreduce(buffer)
        world.assert_same(buffer.get())
        assert (buffer.get() == everyones.sum(axis=0)).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("sizes", [(100, 101), (100, 6), (6, 100), (5, 100), (101, 100)])
def test_sizes_that_differ_by_lanes(world, cupy, streams, lanes, sizes):
    """One rank's vector is of another size, or two are: all ranks know, and a right sum comes next."""
    group = group_on_nodes(world)
    for wrong in [{rank} for rank in range(world.size)] + [{0, world.size - 1}] * (world.size > 2):
        ending = group.allreduce_checked(cupy.zeros(sizes[world.rank in wrong]))
        assert np.isnan(ending[0])
        assert group.allreduce_checked(cupy.ones(50))[0] == world.size
