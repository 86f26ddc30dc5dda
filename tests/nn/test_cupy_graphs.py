"""A training step, captured as a CUDA graph and replayed, does what its calls do."""

import functools
import gc
import weakref

import numpy as np
import pytest

from cupy_syncbn import CapturedStep, NCCLProcessGroup
from support.arrays import random_array, random_batch
from support.compare import assert_identical
from support.graphs import (
    assert_same,
    capture_by_hand,
    check_capture_by_hand,
    check_captured_step,
    make_layer,
    replay_beside_others,
    step_of,
)

SHAPES = {"rows": (4, 6, 40, 40), "columns": (64, 24), "several splits": (2, 3, 150, 150)}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_replay_equals_calls(rng, cupy, shape, momentum):
    captured_layer, layer = (make_layer(shape, momentum=momentum) for _ in "12")
    x, r, dy = (cupy.asarray(random_array(rng, shape)) for _ in "123")
    captured = CapturedStep(functools.partial(step_of, captured_layer, x, dy, r))
    step_of(layer, x, dy, r)  # as the constructor did
    for _ in range(3):
        for array in x, r, dy:
            array[...] = cupy.asarray(random_batch(rng, shape))
        assert_same(captured(), step_of(layer, x, dy, r))
        for name, array in captured_layer.state_dict().items():
            assert_identical(array.get(), layer.state_dict()[name].get())
    assert int(captured_layer.num_batches_tracked) == 4


def test_a_graph_needs_no_more_than_the_launches(rng, emulator, cupy):
    shape = 2, 3, 150, 150
    layer = make_layer(shape, momentum=None)
    x, r, dy = (cupy.asarray(random_array(rng, shape)) for _ in "123")
    assert CapturedStep(lambda: step_of(layer, x, dy, r))._graph.nodes == ["launch"] * 4
    layer.eval()
    assert CapturedStep(lambda: layer(x, residual=r))._graph.nodes == ["launch"]


def test_an_evaluation_has_no_workspace(rng, cupy, monkeypatch):
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    layer, x = make_layer((4, 6, 9)).eval(), cupy.asarray(random_batch(rng, (4, 6, 9)))
    monkeypatch.delattr(cuda_operations._Workspaces, "current")
    layer(x)


def test_others_may_use_what_is_free(emulator, cupy):
    check_captured_step(cupy)
    check_capture_by_hand(cupy)


def test_a_workspace_that_grows_in_a_graph_is_kept(emulator, cupy):
    """Launches that were captured before write to the smaller one."""
    rng, shapes = np.random.default_rng(0), [(2, 3, 60, 60), (2, 3, 150, 150), (4, 40)]
    inputs = [cupy.asarray(random_batch(rng, shape)) for shape in shapes]
    layers = [make_layer(shape, momentum=None) for shape in shapes]
    sizes = iter([1, 3])

    def step():
        count = next(sizes)
        return [layer(x) for layer, x in zip(layers[:count], inputs[:count], strict=True)]

    captured = CapturedStep(step)
    expected = [make_layer(shape)(x) for shape, x in zip(shapes, inputs, strict=True)]
    replay_beside_others(cupy, captured._graph, captured._pool)
    assert_same(captured._results, expected)


def test_a_graph_outlives_all_but_its_step(rng, cupy):
    x = cupy.asarray(random_batch(rng, (4, 6, 9)))
    expected = make_layer((4, 6, 9))(x).get()
    layer = make_layer((4, 6, 9))
    captured = CapturedStep(functools.partial(layer, x))
    found = weakref.ref(layer)
    del layer
    gc.collect()
    assert_identical(captured().get(), expected)
    del captured
    gc.collect()
    assert found() is None


def test_a_pool_that_is_gone(rng, emulator, cupy):
    """What CapturedStep is for: the memory of a graph must live as long."""
    layer, x = make_layer((4, 6, 9)), cupy.asarray(random_batch(rng, (4, 6, 9)))
    graph, _ = capture_by_hand(cupy, lambda: layer(x) is None, cupy.cuda.MemoryPool())
    gc.collect()
    with pytest.raises(emulator.EmulatorError, match="freed"):
        graph.launch()


def test_a_step_that_waits_for_the_gpu(rng, cupy):
    layer, x = make_layer((4, 6, 9)), cupy.asarray(random_batch(rng, (4, 6, 9)))
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="Capture") as raised:
        CapturedStep(lambda: float(layer(x)[0, 0, 0]))
    assert "must not wait for the GPU" in raised.value.__notes__[0]
    assert CapturedStep(lambda: layer(x))().shape == x.shape  # nothing is left behind


def test_no_gpu(monkeypatch):
    monkeypatch.setattr("cupy_syncbn.arrays.why_no_gpu", lambda: "CuPy sees no GPU")
    with pytest.raises(RuntimeError, match="CuPy sees no GPU"):
        CapturedStep(lambda: None)


@pytest.mark.mpi_skip
def test_nccl_of_one_rank_can_be_captured(rng, cupy):
    if not hasattr(cupy.cuda.runtime, "graphLaunch"):
        pytest.skip("the emulator has a stand-in for NCCL under MPI alone")
    try:
        group = NCCLProcessGroup()
    except RuntimeError as error:
        pytest.skip(f"{error}")
    x = cupy.asarray(rng.normal(size=1000))
    expected = x.get()
    captured = CapturedStep(lambda: group.allreduce(x))
    captured()
    np.testing.assert_array_equal(x.get(), expected)
    group.check_errors()
