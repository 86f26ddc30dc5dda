"""How CuPy arrays travel: by host-staged MPI, CUDA-aware MPI, and NCCL, behind a stand-in for it.

Work on the emulator's streams is done late here, so that whoever reads too early reads something else.
"""

import contextlib
import functools
import gc
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from mpi4py import MPI

import cupy_syncbn
from cupy_syncbn import (
    BatchNorm2d,
    CollectiveTimeoutError,
    DistributedDataParallel,
    MPIProcessGroup,
    NCCLProcessGroup,
    RankMismatchError,
    RemoteRankError,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    new_group,
    split_group,
    sync_batch_norm,
)
from cupy_syncbn.comm import transports
from support import nccl_stand_in
from support.arrays import BFLOAT16, random_array, random_batch, random_channels
from support.compare import assert_close, assert_identical
from support.launcher import REPOSITORY, clean_environment
from support.reference import BatchNorm

SHAPE = (18, 4, 3, 5)
TRANSPORTS = ("mpi", "cuda-aware-mpi", "nccl")
# As ids in capitals: a test with the id "mpi" has pytest-mpi's mark.


@pytest.fixture
def emulator(world, cupy):
    """Return the emulator, as a node with a GPU for each rank, which is its current device."""
    if "StandIn" not in type(cupy).__name__:
        pytest.skip("there is no emulator beside a real GPU")
    import cuda_emulator

    cuda_emulator.devices.count = world.size
    cupy.cuda.Device(world.rank).use()
    yield cuda_emulator
    cupy.cuda.Device(0).use()
    cuda_emulator.devices.count = 1


@pytest.fixture
def streams(emulator):
    """Let streams work late, and count how often the host waits for them."""
    found = emulator.streams
    found.at_once = False
    found.synchronizations.clear()
    yield found
    found.at_once = True
    found.finish_all()  # the groups are gone now


@pytest.fixture
def nccl(monkeypatch, streams, cupy):
    """Return the stand-in for NCCL."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("this MPI may not be called by several threads")
    return nccl_stand_in.install(monkeypatch, cupy)


def eventually(condition, what, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def communicator_of(group):
    return group._transport._operations._communicator


@pytest.fixture(params=TRANSPORTS, ids=str.upper)
def group(request, world, streams):
    """Return the world by one of the transports."""
    if request.param == "nccl":
        request.getfixturevalue("nccl")
    return new_group(transport=request.param, timeout=30)


# ---- All transports ----
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


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16], ids=str)
def test_nccl_adds_up_16_bit_types(world, rng, cupy, nccl, dtype):
    parts = [random_array(rng, 50).astype(dtype) for _ in range(world.size)]
    buffer = cupy.asarray(parts[world.rank])
    new_group(transport="nccl").allreduce(buffer)
    assert_close(buffer.get(), sum(part.astype("f4") for part in parts))


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
    parts = [np.array([*random_array(rng, 20, "f8"), 0, 3, 9]) for _ in range(world.size)]
    vector, expected = cupy.asarray(parts[world.rank]), parts[world.rank].copy()
    ending = group.allreduce_checked(vector)
    MPIProcessGroup(world.comm).allreduce_checked(expected)
    assert_close(vector.get(), expected)
    if isinstance(group._transport, transports.HostStaged):
        assert_identical(vector.get(), expected)  # it is the same sum
    ending = ending if isinstance(ending, np.ndarray) else ending.get()
    np.testing.assert_array_equal(ending[-3:], world.size * np.array([0, 3, 9]))
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


# ---- Through the host ----
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
    streams.synchronizations.clear()
    layer(x)
    layer.backward(x)
    assert len(streams.synchronizations) == (2 if world.size > 1 else 0)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("transport", ["mpi", "cuda-aware-mpi"])
@pytest.mark.parametrize("longer", [5, 200_000])
def test_lengths_that_differ(world, cupy, streams, transport, longer):
    group = new_group(transport=transport)
    for _ in range(2):
        vector = cupy.zeros(10 + longer * (world.rank == 1))
        assert np.isnan(group.allreduce_checked(vector)[-3])
        assert np.isnan(vector.get()[-3])
    vector = cupy.ones(100)
    assert group.allreduce_checked(vector)[-3] == world.size


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


# ---- MPI that takes addresses on the GPU ----
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


# ---- NCCL ----
def test_nothing_waits_for_the_host(world, rng, cupy, nccl, streams):
    """Neither forward nor backward: the GPU is far behind when they return."""
    layer = SyncBatchNorm(4, device="cuda", process_group=new_group(transport="nccl"))
    x, dy = (cupy.asarray(random_array(rng, SHAPE)) for _ in "12")
    layer.backward((layer(x), dy)[1])  # the workspaces are there, the communicator too
    cupy.cuda.get_current_stream().synchronize()
    layer.zero_grad()
    streams.synchronizations.clear()
    for _ in range(2):
        y = layer(x)
        dx = layer.backward(dy)
        layer.zero_grad()
    assert streams.synchronizations == []
    assert cupy.cuda.get_current_stream()._under_way()
    assert np.isfinite(y.get()).all()
    assert np.isfinite(dx.get()).all()


def test_streams_with_operations_of_nccl(world, cupy, nccl):
    group = new_group(transport="nccl")
    results = []
    for step in range(6):
        with (cupy.cuda.Stream(), cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True))[step % 3]:
            buffer = cupy.full(5, 1.0 + step)
            group.allreduce(buffer)
            results.append(buffer)
    group.check_errors()
    for step, buffer in enumerate(results):
        assert (buffer.get() == (1 + step) * world.size).all()


def test_one_communicator_serves_all_layers_and_calls(world, rng, cupy, nccl, monkeypatch):
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "nccl")
    comm = world.comm.Dup()
    x = cupy.asarray(random_array(rng, SHAPE))
    nccl_stand_in.made.clear()
    for _ in range(2):
        SyncBatchNorm(4, device="cuda", process_group=comm)(x)
        sync_batch_norm(x, process_group=comm)
    assert len(nccl_stand_in.made) == (world.size > 1)
    comm.Free()


def test_nccl_process_group(world, cupy, nccl):
    nccl_stand_in.made.clear()
    group = NCCLProcessGroup(world.comm, timeout=20)
    assert nccl_stand_in.made == [f"rank {world.rank} of {world.size} on 0000:{world.rank:02X}:00.0"]
    assert (group.rank, group.size, group.timeout) == (world.rank, world.size, 20)
    buffer, on_host = cupy.ones(3), np.ones(3)
    group.allreduce(buffer)
    group.allreduce(on_host)
    assert buffer.tolist() == on_host.tolist() == [world.size] * 3
    assert NCCLProcessGroup().size == world.size


def test_types_and_devices_that_nccl_does_not_take(world, emulator, cupy, nccl):
    group = new_group(transport="nccl")
    for dtype in "bool", "complex64":
        with pytest.raises(TypeError, match=f"got {dtype}"):
            group.allreduce(cupy.zeros(3, dtype))
    emulator.devices.count = world.size + 1
    with cupy.cuda.Device(world.size):
        elsewhere = cupy.zeros(3)
        with pytest.raises(ValueError, match=rf"device {world.rank}.*got one on {world.size}"):
            group.allreduce(elsewhere)


# ---- Which transport ----
def carrier_of(group, cupy):
    """Return the kind of transport that a group has chosen, after a sum by it."""
    buffer = cupy.ones(3)
    group.allreduce(buffer)
    assert buffer.tolist() == [group.size] * 3
    return type(group._transport)


@pytest.mark.parametrize("asked", ["argument", "variable", "default"])
def test_auto_is_nccl_where_each_rank_has_a_gpu(world, cupy, nccl, monkeypatch, asked):
    monkeypatch.delenv("CUPY_SYNCBN_TRANSPORT", raising=False)
    if asked == "variable":
        monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "auto")
    group = new_group(transport="auto" if asked == "argument" else None)
    assert carrier_of(group, cupy) is transports.NCCL


def test_auto_is_nccl_where_each_rank_sees_only_its_own_gpu(world, emulator, cupy, nccl, monkeypatch):
    """All are on device 0, of their own."""
    emulator.devices.count = 1
    assert cupy_syncbn.bind_device() == 0
    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetPCIBusId", lambda device: f"0000:{world.rank:02X}:00.0")
    assert carrier_of(new_group(transport="auto"), cupy) is transports.NCCL


def share_gpus(world, monkeypatch, cupy):
    monkeypatch.setattr(
        cupy.cuda.runtime, "deviceGetPCIBusId", lambda device: f"0000:{world.rank // 2:02X}:00.0"
    )


@pytest.mark.mpi(min_size=2)
def test_auto_is_mpi_where_ranks_share_a_gpu(world, cupy, nccl, monkeypatch):
    share_gpus(world, monkeypatch, cupy)
    nccl_stand_in.made.clear()
    assert carrier_of(new_group(transport="auto"), cupy) is transports.HostStaged
    assert nccl_stand_in.made == []


def test_auto_is_mpi_where_a_rank_has_no_nccl(world, cupy, nccl, monkeypatch):
    nccl_stand_in.install(monkeypatch, cupy, available=world.rank != world.size - 1)
    assert carrier_of(new_group(transport="auto"), cupy) is transports.HostStaged


@pytest.mark.parametrize("kind", TRANSPORTS, ids=str.upper)
def test_transport_by_the_environment(world, cupy, nccl, monkeypatch, kind):
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", kind)
    found = carrier_of(new_group(), cupy)
    assert found.name == kind
    assert found is not carrier_of(new_group(transport="mpi" if kind == "nccl" else "nccl"), cupy)


def test_unknown_transport(monkeypatch):
    with pytest.raises(ValueError, match=r"'auto', 'mpi', 'cuda-aware-mpi', 'nccl'.*got 'pigeon'"):
        new_group(transport="pigeon")
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "gloo")
    with pytest.raises(ValueError, match="got 'gloo'"):
        new_group()


def expect_on_all_ranks(match, cupy):
    """Every way to ask for NCCL says the same, on all ranks."""
    for ask in NCCLProcessGroup, lambda: new_group(transport="nccl").allreduce(cupy.ones(3)):
        with pytest.raises(RuntimeError, match=f"transport 'nccl': {match}"):
            ask()


def test_nccl_missing_on_a_rank(world, cupy, nccl, monkeypatch):
    last = world.size - 1
    nccl_stand_in.install(monkeypatch, cupy, available=world.rank != last)
    expect_on_all_ranks(f"rank {last} .*finds no NCCL: install nvidia-nccl-cu12", cupy)


def test_gpu_missing_on_a_rank(world, cupy, nccl, monkeypatch):
    def get_device():
        raise cupy.cuda.runtime.CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device")

    x = cupy.ones(3)
    if world.rank == world.size - 1:
        monkeypatch.setattr(cupy.cuda.runtime, "getDevice", get_device)
    for ask in NCCLProcessGroup, lambda: new_group(transport="nccl").allreduce(x):
        with pytest.raises(RuntimeError, match=f"rank {world.size - 1} .*no GPU: cudaErrorNoDevice"):
            ask()


def test_cupy_missing_on_a_rank(world, nccl, monkeypatch):
    if world.rank == world.size - 1:
        monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        RuntimeError, match=f"rank {world.size - 1} .*CuPy is not installed: pip install 'cupy-cuda13x"
    ):
        NCCLProcessGroup()


@pytest.mark.mpi(min_size=2)
def test_ranks_that_share_a_gpu(world, cupy, nccl, monkeypatch):
    share_gpus(world, monkeypatch, cupy)
    host = MPI.Get_processor_name()
    expect_on_all_ranks(f"ranks 0 and 1 share GPU 0000:00:00.0 of {host}.*bind_device", cupy)


def test_same_gpu_number_on_two_hosts(world, cupy, nccl, monkeypatch):
    """That is two GPUs, which the stand-in cannot connect."""
    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetPCIBusId", lambda device: "0000:00:00.0")
    group = new_group(transport="nccl")
    group.host = f"node{world.rank}"
    assert transports.why_no_nccl(group) == ""


def test_unique_id_that_cannot_be_made(world, cupy, nccl, monkeypatch):
    def get_unique_id():
        raise nccl.NcclError(2)

    monkeypatch.setattr(nccl, "get_unique_id", get_unique_id)
    expect_on_all_ranks("rank 0: NCCL_ERROR_SYSTEM_ERROR", cupy)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fault", ["error", "wait"])
def test_communicator_that_cannot_be_made(world, cupy, nccl, monkeypatch, fault):
    """Where a rank fails NCCL keeps the others waiting, longer than the timeout."""
    monkeypatch.setattr(nccl_stand_in, "PATIENCE", 2.0)
    proceed = threading.Event()

    def broken(*arguments):
        if fault == "error":
            raise nccl.NcclError(1)
        proceed.wait(3)

    if world.rank == 1:
        monkeypatch.setattr(nccl, "NcclCommunicator", broken)
    group = new_group(transport="nccl", timeout=1)
    start = time.monotonic()
    where = "rank 1: .*CUDA" if fault == "error" else r"rank \d: it waited 0.5 s"
    with pytest.raises(RuntimeError, match=f"made no communicator on {where}"):
        group.allreduce(cupy.ones(3))
    assert time.monotonic() - start < 1.5
    proceed.set()
    eventually(lambda: not any("NCCL's start" in thread.name for thread in threading.enumerate()), "stuck", 9)
    world.comm.Barrier()


def test_unique_id_of_older_cupy(world, cupy, nccl, monkeypatch):
    """Before CuPy 14 it is a tuple of signed numbers."""
    seen = []
    monkeypatch.setattr(nccl, "get_unique_id", lambda: tuple(range(-128, 0)))

    class Communicator(nccl.NcclCommunicator):
        def __init__(self, ndev, commId, rank):
            seen.append(commId)
            self._is_open = False

        def check_async_error(self):
            pass

    monkeypatch.setattr(nccl, "NcclCommunicator", Communicator)
    NCCLProcessGroup()
    assert seen == [tuple(range(-128, 0))]


# ---- Errors that show later ----
def nccl_layer(timeout=20.0, **arguments):
    group = new_group(transport="nccl", timeout=timeout)
    return SyncBatchNorm(4, device="cuda", process_group=group, name="stem", **arguments)


def state_of(layer):
    return [array.get() for array in layer.state_dict().values()]


def assert_dead(group, error, match, cupy):
    """The communicator is aborted, and every later use raises the same error."""
    communicator = communicator_of(group)
    eventually(lambda: communicator.was_aborted, "the communicator was not aborted")
    for use in group.check_errors, lambda: group.allreduce(cupy.ones(3)):
        with pytest.raises(error, match=match) as caught:
            use()
        assert caught.value is group._transport._operations._error
    assert len(caught.traceback) < 10


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("found_by", ["check_errors", "next call", "watching thread"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fault_of_a_rank(world, rng, cupy, nccl, direction, found_by):
    """It raises its own error; the others hear of it when their GPU has, and nothing has changed by then."""
    layer = nccl_layer(momentum=None)
    group = layer.process_group
    x, dy = (cupy.asarray(random_batch(rng, SHAPE)) for _ in "12")
    layer(x)
    group.check_errors()
    before = state_of(layer)
    call, other = (layer, layer.backward) if direction == "forward" else (layer.backward, layer)
    faulty = world.size - 1
    if world.rank == faulty:
        world.comm.Barrier()
        with pytest.raises(TypeError, match="numpy"):
            call(np.ones(SHAPE, "f4"))
        # The others take no more: it must not wait for them.
        assert_dead(group, RemoteRankError, f"rank {faulty} failed before {direction}", cupy)
    else:
        result = call(x)  # returns: nobody knows yet
        if found_by == "watching thread":
            # Two are under way, and the host will wait for the second, to which the faulty rank never comes.
            second = other(dy)
        world.comm.Barrier()
        match = f"rank {faulty} failed before {direction} .* of stem"
        if found_by == "check_errors":
            with pytest.raises(RemoteRankError, match=match):
                group.check_errors()
        elif found_by == "next call":
            cupy.cuda.get_current_stream().synchronize()
            with pytest.raises(RemoteRankError, match=match):
                layer(x)
        else:
            second.get()
        assert result.shape == SHAPE
        assert_dead(group, RemoteRankError, match, cupy)
        for actual, expected in zip(state_of(layer), before, strict=True):
            assert_identical(actual, expected)
    world.comm.Barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ranks_in_different_calls(world, rng, cupy, nccl, dtype):
    group = new_group(transport="nccl", timeout=20)
    layers = [
        SyncBatchNorm(4, device="cuda", dtype=dtype, process_group=group, name=name)
        for name in ("stem", "head")
    ]
    x = cupy.asarray(random_batch(rng, SHAPE, dtype))
    for layer in layers:
        layer(x)
    group.check_errors()
    layer = layers[world.rank == 1]
    before = state_of(layer)
    layer(x)
    match = f"rank {world.rank} is in forward 1 of {layer.name} .*another call"
    with pytest.raises(RankMismatchError, match=match):
        group.check_errors()
    assert_dead(group, RankMismatchError, match, cupy)
    for actual, expected in zip(state_of(layer), before, strict=True):
        assert_identical(actual, expected)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("waits_in", ["check_errors", "next call", "a copy to the host"])
def test_rank_that_never_comes(world, rng, cupy, nccl, waits_in):
    """The thread aborts the communicator in time, wherever the host is."""
    timeout = 0.5
    layer = nccl_layer(timeout)
    group = layer.process_group
    x = cupy.asarray(random_batch(rng, SHAPE))
    layer(x)  # its end may be noticed only when the next one hangs
    if world.rank > 0:
        start = time.monotonic()
        y = layer(x)
        assert time.monotonic() - start < timeout
        match = rf"^forward 1 of stem \(4 channels\): rank {world.rank} of {world.size} waited 0.5 s .*NCCL"
        if waits_in == "a copy to the host":
            y.get()
        elif waits_in == "next call":
            eventually(lambda: communicator_of(group).was_aborted, "it was not aborted")
            with pytest.raises(CollectiveTimeoutError, match=match):
                layer(x)
        else:
            with pytest.raises(CollectiveTimeoutError, match=match):
                group.check_errors()
        assert timeout <= time.monotonic() - start < timeout + 2
        assert_dead(group, CollectiveTimeoutError, match, cupy)
    world.comm.Barrier()
    group.check_errors() if world.rank == 0 else None


@pytest.mark.mpi(min_size=2)
def test_operations_without_a_layer_are_watched(world, cupy, nccl):
    for name in "allreduce", "broadcast":
        group = new_group(transport="nccl", timeout=0.3)
        group.allreduce(cupy.ones(3))
        group.check_errors()
        if world.rank != 1:
            getattr(group, name)(cupy.ones(3))
            with pytest.raises(CollectiveTimeoutError):
                group.check_errors()
        world.comm.Barrier()


@pytest.mark.mpi(min_size=2)
def test_lengths_that_differ_by_nccl(world, cupy, nccl):
    """NCCL does not compare them: it hangs, until the timeout."""
    group = new_group(transport="nccl", timeout=0.3)
    group.allreduce_checked(cupy.zeros(10 + 5 * (world.rank == 1)))
    with pytest.raises(CollectiveTimeoutError):
        group.check_errors()


def test_call_that_blocks_in_nccl(world, cupy, nccl, monkeypatch):
    """The first operation may wait for the other ranks on the host; it is watched as well."""
    group = new_group(transport="nccl", timeout=0.3)
    group.allreduce(cupy.ones(3))
    communicator = communicator_of(group)

    def all_reduce(*arguments):
        eventually(lambda: communicator.was_aborted, "nobody ended the call")
        raise nccl.NcclError(4)

    monkeypatch.setattr(communicator, "allReduce", all_reduce)
    with pytest.raises(CollectiveTimeoutError):
        group.allreduce(cupy.ones(3))


def test_abort_waits_for_the_host_to_leave_nccl(world, cupy, nccl, monkeypatch):
    """It frees what the call works on. Only a call that is stuck is not waited for."""
    group = new_group(transport="nccl", timeout=20)
    group.allreduce(cupy.ones(3))
    communicator, inside, found = communicator_of(group), [], []
    abort = communicator.abort

    def all_reduce(*arguments):
        inside.append(True)
        communicator.asynchronous_error = 6
        eventually(lambda: group._transport._operations._error, "the error was not noticed")
        time.sleep(0.05)
        inside.clear()

    monkeypatch.setattr(communicator, "allReduce", all_reduce)
    monkeypatch.setattr(communicator, "abort", lambda: (found.append(bool(inside)), abort()))
    group.allreduce(cupy.ones(3))
    eventually(lambda: found, "it was not aborted")
    assert found == [False]
    with pytest.raises(nccl.NcclError, match="REMOTE"):
        group.allreduce(cupy.ones(3))
    world.comm.Barrier()


def test_error_of_the_gpu(world, cupy, nccl, monkeypatch):
    """After an illegal address nothing ends any more: it is not for the other ranks to wait for."""
    group = new_group(transport="nccl", timeout=20)
    group.allreduce(cupy.ones(3))
    group.check_errors()
    monkeypatch.setattr(cupy.cuda.runtime, "eventQuery", lambda pointer: 700)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="700"):
        group.allreduce(cupy.ones(3)), group.check_errors()
    world.comm.Barrier()


def test_error_of_a_call(world, cupy, nccl, monkeypatch):
    """It is the caller's, and leaves nothing to wait for."""
    group = new_group(transport="nccl")
    group.allreduce(cupy.ones(3))

    def all_reduce(*arguments):
        raise nccl.NcclError(1)

    monkeypatch.setattr(communicator_of(group), "allReduce", all_reduce)
    with pytest.raises(nccl.NcclError, match="CUDA"):
        group.allreduce(cupy.ones(3))
    group.check_errors()


@pytest.mark.parametrize("status", [2, 6])
def test_asynchronous_error_of_nccl(world, rng, cupy, nccl, status):
    layer = nccl_layer()
    group, x = layer.process_group, cupy.asarray(random_batch(rng, SHAPE))
    group.allreduce(cupy.ones(3))
    layer(x)
    group.check_errors()
    communicator_of(group).asynchronous_error = status
    eventually(lambda: communicator_of(group).was_aborted, "it was not aborted")
    match = {2: "SYSTEM", 6: "REMOTE"}[status]
    if world.size > 1:
        with pytest.raises(nccl.NcclError, match=match):
            layer(x)
    assert_dead(group, nccl.NcclError, match, cupy)


def test_check_errors_waits_for_all(world, rng, cupy, nccl, streams):
    layer = nccl_layer()
    x = cupy.asarray(random_batch(rng, SHAPE))
    results = []
    for _ in range(3):
        results += [layer(x), layer.backward(x)]
        layer.zero_grad()
    streams.synchronizations.clear()
    layer.process_group.check_errors()
    assert streams.synchronizations == []  # it looks, so that it can stop
    if world.size > 1:
        assert not layer.process_group._transport._operations._pending
    for result in results:
        assert np.isfinite(result.get()).all()


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "cupy_syncbn NCCL"]


@pytest.mark.parametrize("use", ["sum", "layer", "graph", "error"])
def test_watching_thread_ends_with_its_group(world, rng, cupy, nccl, use):
    gc.collect()
    eventually(lambda: not watchers(), "threads outlive the groups of earlier tests")
    layer = nccl_layer()
    group = layer.process_group
    group.allreduce(cupy.ones(3))
    communicator = communicator_of(group)
    (thread,) = watchers()
    assert thread.daemon
    if use in ("layer", "error"):
        layer(cupy.asarray(random_batch(rng, SHAPE)))
    elif use == "graph":
        graph = capture(cupy, functools.partial(layer, cupy.asarray(random_batch(rng, SHAPE))))
    if use == "error":
        communicator.asynchronous_error = 6
        eventually(lambda: communicator.was_aborted, "it was not aborted")
    graph = layer = group = None  # noqa: F841
    gc.collect()
    eventually(lambda: not thread.is_alive(), "the thread goes on")
    assert communicator.was_aborted == (use == "error")  # the operations were to end
    with pytest.raises(nccl.NcclError):
        communicator.size()


@pytest.mark.mpi_skip
def test_process_ends_while_a_thread_watches():
    code = """
import pytest, sys
sys.path.insert(0, "tests")
import cuda_emulator
from support import nccl_stand_in
with cuda_emulator.installed() as cupy, pytest.MonkeyPatch.context() as monkeypatch:
    nccl_stand_in.install(monkeypatch, cupy)
    from cupy_syncbn import NCCLProcessGroup
    group = NCCLProcessGroup()
    group.allreduce(cupy.ones(3))
    print("done", flush=True)
"""
    import cuda_emulator

    if cuda_emulator.available():
        pytest.skip(cuda_emulator.available())
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=30,
        cwd=REPOSITORY, env=clean_environment(PYTHONPATH=str(REPOSITORY)),
    )  # fmt: skip
    assert (process.returncode, process.stdout, process.stderr) == (0, "done\n", "")


# ---- Graphs ----
def capture(cupy, step):
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # such a stream does not wait for what others were given
    with stream:
        step()  # the workspaces are there, the communicator too
        stream.synchronize()
        stream.begin_capture()
        results = step()
        return stream, stream.end_capture(), results


def step_of(layer, x, dy):
    layer.zero_grad()
    y = layer(x)
    return y, layer.backward(dy)


def test_captured_steps(world, rng, cupy, nccl, streams):
    layer, reference = nccl_layer(), BatchNorm(4)
    group = layer.process_group
    part = world.part(SHAPE[0])
    x, dy = (cupy.asarray(random_batch(rng, SHAPE)[part]) for _ in "12")
    stream, graph, (y, dx) = capture(cupy, lambda: step_of(layer, x, dy))
    layer.reset_running_stats()
    cupy.cuda.Device().synchronize()
    for _ in range(3):
        new_x, new_dy = (random_batch(rng, SHAPE) for _ in "12")
        with stream:
            x[...], dy[...] = cupy.asarray(new_x[part]), cupy.asarray(new_dy[part])
            streams.synchronizations.clear()
            graph.launch()
            assert streams.synchronizations == []
            group.check_errors()
            assert_close(y.get(), reference(new_x), part)
            assert_close(dx.get(), reference.backward(new_dy), part)
            assert_close(layer.running_var.get(), reference.running_var)


@pytest.mark.mpi(min_size=2)
def test_captured_exchanges_tell_of_errors_after_a_replay(world, rng, cupy, nccl):
    """The ranks replay graphs of different layers."""
    group = new_group(transport="nccl", timeout=20)
    layers = [SyncBatchNorm(4, device="cuda", process_group=group, name=name) for name in ("stem", "head")]
    x = cupy.asarray(random_batch(rng, SHAPE))
    graphs = [capture(cupy, functools.partial(layer, x)) for layer in layers]
    stream, graph, _ = graphs[world.rank == 1]
    before = [state_of(layer) for layer in layers]
    with stream:
        group.check_errors()  # nothing has been replayed yet
        graph.launch()
        with pytest.raises(RankMismatchError, match="is in forward 1 of"):
            group.check_errors()
    for layer, expected in zip(layers, before, strict=True):
        for actual, array in zip(state_of(layer), expected, strict=True):
            assert_identical(actual, array)


@pytest.mark.mpi(min_size=2)
def test_replay_that_a_rank_does_not_make(world, rng, cupy, nccl):
    layer = nccl_layer(0.4)
    stream, graph, _ = capture(cupy, functools.partial(layer, cupy.asarray(random_batch(rng, SHAPE))))
    if world.rank > 0:
        with stream:
            graph.launch()
            with pytest.raises(CollectiveTimeoutError):
                layer.process_group.check_errors()
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


# ---- Devices ----
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


# ---- The stand-in for NCCL finds what it is for ----
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


# ---- scripts/cuda_aware_check.py ----
@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import cuda_aware_check

    monkeypatch.setattr(cuda_aware_check, "SHAPE", (4, 6, 5))
    monkeypatch.setattr(cuda_aware_check, "EXCHANGES", 3)
    return cuda_aware_check


def test_check_of_cuda_aware_mpi(world, cupy, streams, check, capsys):
    status = check.main()
    said = capsys.readouterr().out
    if world.size == 1:
        assert (status, said) == (2, "cuda-aware-mpi: not checked: start at least two ranks\n")
    else:
        assert status == 0
        assert ("equal to host-staged" in said) == (world.rank == 0)


@pytest.mark.mpi(min_size=2)
def test_check_finds_a_wrong_sum(world, cupy, streams, check, capsys, monkeypatch):
    add_up = transports.CUDAAware._add_up

    def wrong(self, buffer, **arguments):
        result = add_up(self, buffer, **arguments)
        if buffer.size > 1000 and self._group.rank == 1:
            buffer[5] = np.nan
        return result

    monkeypatch.setattr(transports.CUDAAware, "_add_up", wrong)
    assert check.main() == 1
    assert ("differ from host-staged" in capsys.readouterr().out) == (world.rank == 0)


def test_check_without_a_gpu(world, emulator, check, capsys):
    from cupy_syncbn import arrays

    emulator.devices.count = 0
    arrays.why_no_gpu.cache_clear()
    assert check.main() == 2
    assert "sees no GPU" in capsys.readouterr().out
    emulator.devices.count = world.size


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("codes", "status", "told"),
    [
        (["echo 'cuda-aware-mpi: equal'", "kill -SEGV $$"], 0, ["MPI 0: .*equal", "MPI 1: crashes"]),
        (["echo 'cuda-aware-mpi: equal'", "echo 'cuda-aware-mpi: differ'; exit 1"], 1, ["MPI 1: .*differ"]),
        (["echo why; exit 9"], 3, ["MPI 0: crashes, exit status 9\n    why", "no MPI library here takes"]),
        (["sleep 60"], 3, ["MPI 0: did not end within 1 s"]),
        ([], 2, ["no mpirun"]),
    ],
)  # fmt: skip
def test_search_for_a_cuda_aware_mpi(cupy, check, capfd, monkeypatch, codes, status, told):
    libraries = [check.Candidate(f"MPI {i}", ["sh", "-c", code], {}) for i, code in enumerate(codes)]
    monkeypatch.setattr(check, "candidates", lambda: libraries)
    monkeypatch.setattr(check, "DEADLINE", 1)
    assert check.search() == status
    output = capfd.readouterr().out
    for pattern in told:
        assert re.search(pattern, output), output


@pytest.mark.mpi_skip
def test_libraries_that_are_searched(check, tmp_path, monkeypatch):
    for path in "bin/mpirun", "bin/mpiexec.hydra", "lib/libmpi.so.12", "site/libucx/lib/libucp.so":
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5'\n")
        (tmp_path / path).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setenv("IMPI_ROOT", str(tmp_path))
    own, with_ucx, intel = check.candidates()
    assert own.launcher == with_ucx.launcher == [str(tmp_path / "bin" / "mpirun"), "--oversubscribe"]
    assert with_ucx.environment["LD_LIBRARY_PATH"].startswith(str(tmp_path / "site" / "libucx" / "lib"))
    assert intel.launcher == [str(tmp_path / "bin" / "mpiexec.hydra")]
    assert intel.environment["MPI4PY_LIBMPI"] == str(tmp_path / "lib" / "libmpi.so.12")


# ---- The emulator's late streams find what they are for ----
def test_streams_that_work_late(cupy, streams):
    on_host = np.frombuffer(cupy.cuda.alloc_pinned_memory(24), "f8", 3)
    on_host[:] = 7
    source = cupy.arange(3.0)
    with cupy.cuda.Stream() as stream:
        copy = cupy.empty(3)
        copy[...] = source
        copy.get(out=on_host, blocking=False)
        assert on_host.tolist() == [7, 7, 7]
        event = stream.record()
        assert event.done
        assert on_host.tolist() == [0, 1, 2]
        copy.set(on_host)
        on_host[:] = 9  # too early
        assert copy.tolist() == [9, 9, 9]


def test_streams_wait_for_events_and_the_null_stream(cupy, streams):
    null, blocking, other = cupy.cuda.Stream.null, cupy.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    array, ones = cupy.zeros(2), cupy.ones(1)
    cupy.cuda.Device().synchronize()
    with blocking:
        array[:1] = ones
    with null:
        array[1:] = array[:1]
    with other:
        assert array.tolist() == [0, 0]  # such a stream waits for no other
        other.wait_event(null.record())
        assert array.tolist() == [1, 1]


def test_pinned_memory_that_is_freed_early(cupy, emulator, streams):
    array = cupy.ones(3)
    on_host = np.frombuffer(cupy.cuda.alloc_pinned_memory(24), "f8", 3)
    array.get(out=on_host, blocking=False)
    del on_host
    with pytest.raises(emulator.EmulatorError, match="pinned memory was freed"):
        cupy.cuda.get_current_stream().synchronize()


def test_nccl_of_one_rank(request, cupy):
    """By NCCL itself where there is a GPU, else by the stand-in. A layer would leave the exchange out."""
    if "StandIn" in type(cupy).__name__:
        request.getfixturevalue("nccl")
    if missing := transports.nccl.missing_for_nccl()[0]:
        pytest.skip(missing)
    group = NCCLProcessGroup(MPI.COMM_SELF, timeout=30)
    carrier, aborted, seen = group._transport, threading.Event(), []
    communicator = communicator_of(group)

    class Watched:
        def __getattr__(self, name):
            return getattr(communicator, name)

        def abort(self):
            communicator.abort()
            aborted.set()

    def check(trailer):
        seen.append(trailer)
        if trailer[0]:
            raise RemoteRankError("the trailer is bad")

    carrier._operations._communicator = Watched()
    for fault, expectation in (0, contextlib.nullcontext()), (1, pytest.raises(RemoteRankError, match="bad")):
        expected = np.array([3.5, -1, fault, 7, 49])
        vector = cupy.asarray(expected)
        carrier.allreduce_checked(vector)
        carrier.defer(vector[-3:], check, "a call")
        with expectation:
            group.check_errors()
        np.testing.assert_array_equal(vector.get(), expected)
    assert seen == [[0, 7, 49], [1, 7, 49]]
    assert aborted.wait(30)
    with pytest.raises(RemoteRankError, match="bad"):
        carrier.allreduce_checked(vector)
