"""CuPy arrays whose addresses MPI takes."""

import numpy as np
import pytest

from cupy_syncbn import (
    MPIProcessGroup,
    RankMismatchError,
    SyncBatchNorm,
    new_group,
)
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
