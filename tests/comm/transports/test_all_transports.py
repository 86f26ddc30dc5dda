"""How CuPy arrays travel: what all transports share, NCCL behind a stand-in for it.

Work on the emulator's streams is done late here, so that whoever reads too early reads something else.
"""

import contextlib
import time

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm2d,
    CollectiveTimeoutError,
    DistributedDataParallel,
    MPIProcessGroup,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    new_group,
    split_group,
)
from cupy_syncbn.comm import transports
from cupy_syncbn.comm.trailer import FAULT
from support.arrays import BFLOAT16, random_array, random_batch, random_channels
from support.compare import assert_close, assert_identical
from support.reference import BatchNorm
from support.transports import SHAPE, TRANSPORTS


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32"])
def test_sums(world, rng, cupy, group, dtype):
    parts = [random_array(rng, (3, 50), scale=100).astype(dtype) for _ in range(world.size)]
    expected = sum(parts[1:], parts[0])
    buffer = cupy.asarray(parts[world.rank])
    returned = group.allreduce(buffer)
    tolerance = {"rtol": 1e-5, "atol": 1e-3} if dtype == "float32" else {"rtol": 1e-13, "atol": 1e-10}
    np.testing.assert_allclose(buffer.get(), expected, **tolerance)
    np.testing.assert_array_equal(
        returned if isinstance(returned, np.ndarray) else returned.get(), buffer.get()
    )
    world.assert_same(buffer.get())


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16, "float32", "float64", "int64", "bool"], ids=str)
def test_broadcast(world, cupy, group, dtype):
    for root in range(world.size):
        buffer = cupy.asarray(np.full((2, 3), world.rank == root).astype(dtype))
        group.broadcast(buffer, root)
        assert (buffer.get() == 1).all()
    empty = cupy.empty((0, 3), dtype)
    group.broadcast(empty)
    group.allreduce(cupy.empty(0))


def test_exchange(world, rng, cupy, group):
    parts = [np.array([*random_array(rng, 20, "f8"), 0, 3, 9, 5, 25]) for _ in range(world.size)]
    vector, expected = cupy.asarray(parts[world.rank]), parts[world.rank].copy()
    ending = group.allreduce_checked(vector)
    MPIProcessGroup(world.comm).allreduce_checked(expected)
    assert_close(vector.get(), expected)
    if isinstance(group._transport, transports.HostStaged):
        assert_identical(vector.get(), expected)  # it is the same sum
    ending = ending if isinstance(ending, np.ndarray) else ending.get()
    np.testing.assert_array_equal(ending[FAULT:], world.size * np.array([0, 3, 9, 5, 25]))
    group.check_errors()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_steps_equal_the_reference(world, rng, cupy, group, dtype, momentum):
    layer = SyncBatchNorm(4, momentum=momentum, device="cuda", dtype=dtype, process_group=group)
    reference = BatchNorm(4, momentum=momentum)
    reference.weight, reference.bias = random_channels(rng, 4, dtype)
    for name in "weight", "bias":
        getattr(layer, name).data[...] = cupy.asarray(getattr(reference, name))
    part = world.part(SHAPE[0], "uneven")
    for _ in range(3):
        x, dy = random_batch(rng, SHAPE, dtype), random_array(rng, SHAPE, dtype)
        y = layer(cupy.asarray(x[part]))
        dx = layer.backward(cupy.asarray(dy[part]))
        assert_close(y.get(), reference(x), part)
        assert_close(dx.get(), reference.backward(dy), part)
    for name in "running_mean", "running_var":
        assert_close(getattr(layer, name).get(), getattr(reference, name))
    world.assert_same(layer.running_mean.get(), layer.running_var.get())
    assert int(layer.num_batches_tracked) == 3
    group.check_errors()


def test_data_parallel_training(world, rng, cupy, group):
    batches = [(random_batch(rng, SHAPE), random_array(rng, SHAPE)) for _ in range(2)]
    part = world.part(SHAPE[0])

    def train(model, take, scale):
        for x, dy in batches:
            model(cupy.asarray(take(x)))
            model.backward(cupy.asarray(take(dy)))
            if isinstance(model, DistributedDataParallel):
                model.reduce_gradients()
            for parameter in model.parameters():
                parameter.data -= parameter.grad * (0.1 * scale)
            model.zero_grad()
        return [array.get() for array in model.state_dict().values()]

    def network():
        return Sequential(
            BatchNorm2d(4, device="cuda", activation="leaky_relu"), BatchNorm2d(4, device="cuda")
        )

    alone = train(network(), lambda a: a, 1)
    module = convert_sync_batchnorm(network(), group)
    module = DistributedDataParallel(module, group, bucket_cap_mb=1e-5)
    for actual, expected in zip(train(module, lambda a: a[part], world.size), alone, strict=True):
        assert_close(actual, expected, tolerance=3e-6)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=str.upper)
def test_subgroups(request, world, cupy, streams, transport):
    if transport == "nccl":
        request.getfixturevalue("nccl")
    halves = 2 if world.size % 2 == 0 else 1
    size = world.size // halves
    first = world.rank // size * size
    everyone = list(range(world.size))
    split = split_group(size, transport=transport)
    backwards = new_group(everyone[::-1], transport=transport)
    some = new_group(everyone[::2], transport=transport)
    groups = [(split, everyone[first : first + size]), (backwards, everyone[::-1])]
    if world.rank % 2 == 0:
        groups.append((some, everyone[::2]))
    for group, members in groups:
        assert group.transport == transport
        buffer = cupy.asarray([1.0, world.rank])
        group.allreduce(buffer)
        assert buffer.tolist() == [len(members), sum(members)]
        for root, member in enumerate(members):
            buffer = cupy.full(3, world.rank)
            group.broadcast(buffer, root)
            assert buffer.tolist() == [member] * 3


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("transport", ["mpi", "cuda-aware-mpi"])
@pytest.mark.parametrize("longer", [5, 200_000])
def test_lengths_that_differ(world, cupy, streams, transport, longer):
    group = new_group(transport=transport)
    for _ in range(2):
        vector = cupy.zeros(10 + longer * (world.rank == 1))
        assert np.isnan(group.allreduce_checked(vector)[FAULT])
        assert np.isnan(vector.get()[FAULT])
    vector = cupy.ones(100)
    assert group.allreduce_checked(vector)[FAULT] == world.size


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("transport", ["mpi", "cuda-aware-mpi"])
@pytest.mark.parametrize("call", ["allreduce", "allreduce_checked", "broadcast"])
def test_rank_that_never_comes_to_mpi(world, cupy, streams, transport, call):
    group = MPIProcessGroup(world.comm.Dup(), transport=transport, timeout=0.3)
    group.allreduce(cupy.ones(5))
    if world.rank > 0:
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(CollectiveTimeoutError):
                getattr(group, call)(cupy.ones(5))
        assert time.monotonic() - start < 2
    world.comm.Barrier()
    if world.rank == 0:
        with contextlib.suppress(CollectiveTimeoutError):
            getattr(group, call)(cupy.ones(5))
    world.comm.Barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("transport", ["mpi", "cuda-aware-mpi"], ids=str.upper)
def test_other_transports_cannot_be_captured(world, rng, cupy, streams, transport):
    layer = SyncBatchNorm(4, device="cuda", process_group=new_group(transport=transport))
    x = cupy.asarray(random_batch(rng, SHAPE))
    with cupy.cuda.Stream() as stream:
        layer(x)
        stream.begin_capture()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="Capture"):
            layer(x)
        stream.end_capture()
