"""Captured graphs whose pool others use as well, on the emulator."""

import functools
import gc
from unittest import mock

import numpy as np

from cupy_syncbn import CapturedStep, SingleProcessGroup, SyncBatchNorm, sync_batch_norm

from .arrays import random_batch
from .compare import assert_identical

_ONES = 0x3F


def make_layer(shape, **options):
    options = {"activation": "relu", "process_group": SingleProcessGroup()} | options
    return SyncBatchNorm(shape[1], device="cuda", **options)


def step_of(layer, x, dy, r):
    layer.zero_grad()
    y = layer(x, residual=r)
    return [y, *layer.backward(dy), layer.weight.grad, layer.bias.grad]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert_identical(ours.get(), theirs.get())


def capture_by_hand(cupy, step, pool):
    """Capture a step by CuPy's own means; return the graph and the step's results."""
    with cupy.cuda.Stream(non_blocking=True) as stream, cupy.cuda.using_allocator(pool.malloc):
        step()
        stream.synchronize()
        stream.begin_capture()
        results = step()
        return stream.end_capture(), results


def replay_beside_others(cupy, graph, pool):
    """Replay a graph twice after others have got, and written to, all that was free in a pool.

    Return whether what they wrote is still there.
    """
    gc.collect()
    others = []
    with cupy.cuda.using_allocator(pool.malloc):
        for (nbytes, stream), blocks in list(pool._free.items()):
            with cupy.cuda.ExternalStream(stream):
                others += [cupy.empty(nbytes, "uint8") for _ in range(len(blocks))]
    assert not pool.free_bytes()
    for _ in "12":
        for array in others:
            array.fill(_ONES)
        graph.launch()
    return all((array.get() == _ONES).all() for array in others)


def check_captured_step(cupy):
    """The bits of a CapturedStep are the same, whoever gets what is free in its pool."""
    rng, shape = np.random.default_rng(0), (2, 3, 150, 150)
    x, r, dy = (cupy.asarray(random_batch(rng, shape)) for _ in "123")
    layers = [make_layer(shape, momentum=None) for _ in "12"]
    step_of(layers[0], x, dy, r)
    expected = step_of(layers[0], x, dy, r)
    pool = cupy.cuda.MemoryPool()
    with mock.patch.object(cupy.cuda, "MemoryPool", return_value=pool):
        captured = CapturedStep(functools.partial(step_of, layers[1], x, dy, r))
    others_are_hurt = not replay_beside_others(cupy, captured._graph, pool)
    assert others_are_hurt, "the step has left nothing to others: this tests nothing"
    assert_same(captured._results, expected)


def check_capture_by_hand(cupy):
    """A graph writes to nothing but what its step returned and the workspaces."""
    x = cupy.asarray(random_batch(np.random.default_rng(0), (2, 3, 150, 150)))
    step = functools.partial(sync_batch_norm, x, process_group=SingleProcessGroup())
    expected, _ = step()
    pool = cupy.cuda.MemoryPool()
    graph, (y, _saved) = capture_by_hand(cupy, step, pool)
    assert replay_beside_others(cupy, graph, pool), "the graph writes to what others have"
    assert_identical(y.get(), expected.get())
