"""Errors of NCCL and of ranks, which show later: at the next call, or when asked for."""

import functools
import gc
import sys
import threading
import time

import numpy as np
import pytest

from cupy_syncbn import CollectiveTimeoutError, RankMismatchError, RemoteRankError, SyncBatchNorm, new_group
from support.arrays import random_batch
from support.compare import assert_identical
from support.launcher import REPOSITORY, clean_environment, finish
from support.transports import SHAPE, capture, communicator_of, eventually, nccl_layer, state_of


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
    if direction == "forward":
        layer.forget()
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
def test_fault_between_the_sums_of_float64_data(world, rng, cupy, nccl, monkeypatch):
    layer = nccl_layer(momentum=None, dtype="float64")
    x = cupy.asarray(random_batch(rng, SHAPE, "float64"))
    layer(x)
    layer.process_group.check_errors()
    before, faulty = state_of(layer), world.size - 1
    if world.rank == faulty:
        fail_in(monkeypatch, "centered_squares")
        with pytest.raises(MemoryError, match="none left"):
            layer(x)
    else:
        layer(x)
    with pytest.raises(RemoteRankError, match=f"rank {faulty} failed before forward 1 of stem"):
        layer.process_group.check_errors()
    for actual, expected in zip(state_of(layer), before, strict=True):
        assert_identical(actual, expected)


def fail_in(monkeypatch, operation):
    """Let an operation of the backend find no memory."""

    def fail(*arguments):
        raise MemoryError("none left")

    from cupy_syncbn.backends.cuda import operations

    monkeypatch.setattr(operations, operation, fail)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("dtype", "operation"),
    [("float32", "normalize"), ("float32", "input_gradient"), ("float64", "centered_squares")],
)
def test_trailer_behind_which_no_kernel_follows(world, rng, cupy, nccl, monkeypatch, dtype, operation):
    """A rank has no memory for it: the host learns all the same of another that failed before the sum."""
    layer = nccl_layer(dtype=dtype)
    x = cupy.asarray(random_batch(rng, SHAPE, dtype))
    layer(x)
    layer.process_group.check_errors()
    direction, call = "forward", layer
    if operation == "input_gradient":
        direction, call = "backward", layer.backward
    else:
        layer.forget()
    faulty = world.size - 1
    if world.rank == 0:
        fail_in(monkeypatch, operation)
        with pytest.raises(MemoryError, match="none left"):
            call(x)
    elif world.rank == faulty:
        with pytest.raises(TypeError, match="numpy"):
            call(np.ones(SHAPE, dtype))
    else:
        call(x)
    with pytest.raises(RemoteRankError, match=f"rank {faulty} failed before {direction}"):
        layer.process_group.check_errors()
    world.comm.Barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("operation", ["normalize", "input_gradient"])
def test_error_behind_a_kernel_that_tells_the_host(world, rng, cupy, nccl, streams, monkeypatch, operation):
    """The kernel is still to come, and the memory that it writes to stays until then."""
    from cupy_syncbn.backends.cuda import operations

    layer = nccl_layer()
    x = cupy.asarray(random_batch(rng, SHAPE))
    layer(x)
    layer.process_group.check_errors()
    whole = getattr(operations, operation)

    def launch_and_fail(*arguments):
        whole(*arguments)
        raise MemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(operations, operation, launch_and_fail)
        if operation == "normalize":
            layer.forget()
        with pytest.raises(MemoryError, match="none left"):
            (layer if operation == "normalize" else layer.backward)(x)
    layer.process_group.check_errors()
    cupy.cuda.get_current_stream().synchronize()


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
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    process = finish([sys.executable, "-W", "error", "-c", code], 30, cwd=REPOSITORY, env=environment)
    assert (process.returncode, process.stdout, process.stderr) == (0, "done\n", "")
