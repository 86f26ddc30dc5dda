"""A training step, captured as a CUDA graph and replayed, does what its calls do."""

import numpy as np
import pytest

from cupy_syncbn import NCCLProcessGroup, SyncBatchNorm
from support.arrays import random_array, random_batch
from support.compare import assert_identical

SHAPES = {"rows": (4, 6, 40, 40), "columns": (64, 24), "several splits": (2, 3, 300, 300)}


@pytest.fixture
def gpu(cupy):
    if not hasattr(cupy.cuda.runtime, "graphLaunch"):
        pytest.skip("the emulator does work at once, and replays none")
    return cupy


def captured(cupy, step):
    """Return a function that replays a step, and what the step returned when it was captured."""
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    # Memory of its own: what is free while it is captured is written to by each replay.
    with stream, cupy.cuda.using_allocator(pool.malloc):
        step()  # compiles, and fills the pool
        stream.synchronize()
        stream.begin_capture()
        results = step()
        graph = stream.end_capture()

    def replay():
        graph.launch(stream)
        stream.synchronize()
        assert pool.used_bytes() > 0

    return replay, results


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_replay_equals_calls(rng, gpu, shape, momentum):
    layers = [
        SyncBatchNorm(shape[1], momentum=momentum, activation="relu", device="cuda", process_group=None)
        for _ in "12"
    ]
    x, r, dy = (gpu.asarray(random_array(rng, shape)) for _ in "123")

    def step(layer):
        layer.zero_grad()
        y = layer(x, residual=r)
        return [y, *layer.backward(dy), layer.weight.grad, layer.bias.grad]

    replay, replayed = captured(gpu, lambda: step(layers[0]))
    layers[0].load_state_dict(layers[1].state_dict())
    for _ in range(3):
        for array in x, r, dy:
            array[...] = gpu.asarray(random_batch(rng, shape))
        gpu.cuda.Device().synchronize()
        replay()
        called = step(layers[1])
        for actual, expected in zip(replayed, called, strict=True):
            assert_identical(actual.get(), expected.get())
        for name, array in layers[0].state_dict().items():
            assert_identical(array.get(), layers[1].state_dict()[name].get())
    assert int(layers[0].num_batches_tracked) == 3


@pytest.mark.mpi_skip
def test_nccl_of_one_rank_can_be_captured(rng, gpu):
    try:
        group = NCCLProcessGroup()
    except RuntimeError as error:
        pytest.skip(f"{error}")
    x = gpu.asarray(rng.normal(size=1000))
    expected = x.get()
    replay, _ = captured(gpu, lambda: group.allreduce(x))
    replay()
    np.testing.assert_array_equal(x.get(), expected)
    group.check_errors()
