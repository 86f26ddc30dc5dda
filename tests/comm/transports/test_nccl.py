"""CuPy arrays that NCCL sums: communicators, streams, what NCCL lacks or does not take."""

import contextlib
import sys
import threading
import time

import numpy as np
import pytest
from mpi4py import MPI

from cupy_syncbn import (
    CapturedStep,
    NCCLProcessGroup,
    RemoteRankError,
    SyncBatchNorm,
    new_group,
    sync_batch_norm,
)
from cupy_syncbn.comm import transports
from cupy_syncbn.comm.trailer import FAULT
from support import nccl_stand_in
from support.arrays import BFLOAT16, random_array
from support.compare import assert_close, assert_identical
from support.transports import SHAPE, communicator_of, eventually, share_gpus


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16], ids=str)
def test_nccl_adds_up_16_bit_types(world, rng, cupy, nccl, dtype):
    parts = [random_array(rng, 50).astype(dtype) for _ in range(world.size)]
    buffer = cupy.asarray(parts[world.rank])
    new_group(transport="nccl").allreduce(buffer)
    assert_close(buffer.get(), sum(part.astype("f4") for part in parts))


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


@pytest.mark.mpi(min_size=2)
def test_a_captured_step_adds_up_at_each_replay(world, rng, cupy, nccl, streams):
    group = new_group(transport="nccl")
    layers = [SyncBatchNorm(4, momentum=None, device="cuda", process_group=group) for _ in "12"]
    x, dy = cupy.empty(SHAPE, "float32"), cupy.empty(SHAPE, "float32")

    def step(layer):
        layer.zero_grad()
        return layer(x), layer.backward(dy), layer.weight.grad

    def new_batch():
        for array in x, dy:
            batches = [random_array(rng, SHAPE) for _ in range(world.size)]
            array[...] = cupy.asarray(batches[world.rank])

    new_batch()
    captured = CapturedStep(lambda: step(layers[0]))
    # Two sums, and behind each a kernel, which also tells the host of its trailer.
    assert captured._graph.nodes == ["launch", "operation", "launch"] * 2
    step(layers[1])
    for _ in range(2):
        new_batch()
        for ours, theirs in zip(captured(), step(layers[1]), strict=True):
            assert_identical(ours.get(), theirs.get())
        group.check_errors()
    assert int(layers[0].num_batches_tracked) == 3


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
        expected = np.array([3.5, -1, fault, 7, 49, 0, 0])
        vector = cupy.asarray(expected)
        carrier.allreduce_checked(vector)
        carrier.defer(vector[FAULT:], check, "a call")
        with expectation:
            group.check_errors()
        np.testing.assert_array_equal(vector.get(), expected)
    assert seen == [[0, 7, 49, 0, 0], [1, 7, 49, 0, 0]]
    assert aborted.wait(30)
    with pytest.raises(RemoteRankError, match="bad"):
        carrier.allreduce_checked(vector)


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
    group = new_group()
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
    monkeypatch.setattr(nccl_stand_in, "PATIENCE", 1.0)
    proceed = threading.Event()

    def broken(*arguments):
        if fault == "error":
            raise nccl.NcclError(1)
        proceed.wait(1.5)

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
