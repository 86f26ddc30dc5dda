"""Exchanges by NCCL that are captured in CUDA graphs."""

import functools

import pytest

from cupy_syncbn import (
    CollectiveTimeoutError,
    RankMismatchError,
    SyncBatchNorm,
    new_group,
)
from support.arrays import random_batch
from support.compare import assert_close, assert_identical
from support.reference import BatchNorm
from support.transports import SHAPE, capture, nccl_layer, state_of


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
