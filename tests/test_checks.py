"""When something is wrong on one rank, every rank raises, nothing has changed, and training can go on."""

import copy
import re

import numpy as np
import pytest

from cupy_syncbn import (
    RankMismatchError,
    RemoteRankError,
    SyncBatchNorm,
    sync_batch_norm,
    sync_batch_norm_backward,
)
from support.arrays import DTYPES, random_array, random_batch, random_channels
from support.compare import assert_identical, assert_unchanged, snapshot

C = 4


def raises_on(world, ranks, error, message):
    """Expect this error on these ranks, and one that names them on the others."""
    if world.rank in ranks:
        return pytest.raises(error, match=message)
    named = ", ".join(map(str, ranks))
    return pytest.raises(RemoteRankError, match=rf"\branks? {named}\b")


def trained_layer(world, rng, **arguments):
    """Return a layer that has state and gradients to lose, and this rank's next batch."""
    layer = SyncBatchNorm(C, **arguments)
    x = random_batch(rng, (12, C, 3), layer.dtype)[world.part(12, "uneven")]
    layer.backward(layer(x))
    return layer, x


def assert_trains_on(layer, twin, x):
    """Check that a layer goes on as its twin does, to which nothing happened."""
    assert_identical(layer(x), twin(x))
    assert_identical(layer.backward(x), twin.backward(x))
    assert_unchanged(layer, snapshot(twin))


def overlapping(x):
    """Return an output that shares half its memory with the input."""
    buffer = np.empty(x.size + C, x.dtype)
    buffer[: x.size] = x.ravel()
    return {"x": buffer[: x.size].reshape(x.shape), "out": buffer[C:].reshape(x.shape)}


def read_only(x):
    out = np.empty_like(x)
    out.flags.writeable = False
    return out


# name: (arguments of the forward in place of x, error, message)
FORWARD = {
    "0d": (lambda x: {"x": np.ones((), "f4")}, ValueError, r"at least 2D input \(got 0D input\)"),
    "1d": (lambda x: {"x": x[:, 0, 0]}, ValueError, r"at least 2D input \(got 1D input\)"),
    "channels": (lambda x: {"x": x[:, :3]}, ValueError, "4 channels.*3"),
    "channels_last": (lambda x: {"x": np.moveaxis(x, 1, -1)}, ValueError, "4 channels"),
    "float64": (lambda x: {"x": x.astype("f8")}, TypeError, "float64"),
    "int32": (lambda x: {"x": x.astype("i4")}, TypeError, "int32"),
    "bool": (lambda x: {"x": x > 0}, TypeError, "bool"),
    "complex64": (lambda x: {"x": x.astype("c8")}, TypeError, "complex64"),
    "list": (lambda x: {"x": x.tolist()}, TypeError, "list"),
    "none": (lambda x: {"x": None}, TypeError, "None"),
    "residual_shape": (lambda x: {"x": x, "residual": x[:, :, :2]}, ValueError, "residual"),
    "residual_broadcast": (lambda x: {"x": x, "residual": x[:1, :1]}, ValueError, "residual"),
    "residual_dtype": (lambda x: {"x": x, "residual": x.astype("f2")}, TypeError, "residual.*float16"),
    "residual_list": (lambda x: {"x": x, "residual": x.tolist()}, TypeError, "list"),
    "out_shape": (lambda x: {"x": x, "out": np.empty((1, 1), "f4")}, ValueError, "out"),
    "out_dtype": (lambda x: {"x": x, "out": np.empty(x.shape, "f8")}, TypeError, "out.*float64"),
    "out_read_only": (lambda x: {"x": x, "out": read_only(x)}, ValueError, "out"),
    "out_is_x": (lambda x: {"x": x, "out": x}, ValueError, "memory"),
    "out_overlaps_x": (overlapping, ValueError, "memory"),
    "out_is_residual": (lambda x: {"x": x, "residual": (r := x.copy()), "out": r}, ValueError, "memory"),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["running", "no_running"])
@pytest.mark.parametrize("case", FORWARD)
def test_bad_input_of_one_rank(world, rng, case, affine, track_running_stats):
    make, error, message = FORWARD[case]
    layer, x = trained_layer(world, rng, affine=affine, track_running_stats=track_running_stats)
    wrong = make(random_array(rng, (6, C, 3)))
    before, twin = snapshot(layer), copy.deepcopy(layer)
    last = world.size - 1
    with raises_on(world, [last], error, message):
        layer(**(wrong if world.rank == last else {"x": x}))
    assert_unchanged(layer, before)
    assert_trains_on(layer, twin, x)


# In eval y may take the place of x, as no statistics' gradient needs x.
@pytest.mark.parametrize("case", [case for case in FORWARD if case != "out_is_x"])
def test_bad_input_in_eval_is_the_ranks_own(world, rng, case):
    make, error, message = FORWARD[case]
    layer, x = trained_layer(world, rng)
    layer.eval()
    before = snapshot(layer)
    if world.rank == 0:
        with pytest.raises(error, match=message):
            layer(**make(random_array(rng, (6, C, 3))))
    else:
        assert layer(x).shape == x.shape
    assert_unchanged(layer, before)


def test_several_bad_ranks_are_named(world, rng):
    layer, x = trained_layer(world, rng)
    before, twin = snapshot(layer), copy.deepcopy(layer)
    bad = list(range(0, world.size, 2))
    with raises_on(world, bad, ValueError, "1D input"):
        layer(x[:, 0, 0] if world.rank in bad else x)
    with pytest.raises(ValueError, match="1D input"):
        layer(x[:, 0, 0])
    assert_unchanged(layer, before)
    assert_trains_on(layer, twin, x)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_bad_input_among_empty_ranks(world, rng, dtypes):
    dtype, parameter_dtype = DTYPES[dtypes]
    layer = SyncBatchNorm(C, dtype=parameter_dtype)
    before = snapshot(layer)
    x = np.empty((0, C, 3), dtype)
    with raises_on(world, [0], TypeError, "int64"):
        layer(x.astype("i8") if world.rank == 0 else x)
    assert_unchanged(layer, before)


# name: (dy in place of the right one, error, message)
BACKWARD = {
    "samples": (lambda dy: np.ones((len(dy) + 1, *dy.shape[1:]), "f4"), ValueError, "size"),
    "transposed": (lambda dy: np.moveaxis(dy, 1, -1), ValueError, "size"),
    "scalar": (lambda dy: np.ones((), "f4"), ValueError, "size"),
    "float64": (lambda dy: dy.astype("f8"), TypeError, "float64"),
    "float16": (lambda dy: dy.astype("f2"), TypeError, "float16"),
    "int32": (lambda dy: dy.astype("i4"), TypeError, "int32"),
    "list": (lambda dy: dy.tolist(), TypeError, "list"),
    "none": (lambda dy: None, TypeError, "None"),
}


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("case", BACKWARD)
def test_bad_gradient_of_one_rank(world, rng, case, residual):
    make, error, message = BACKWARD[case]
    layer, x = trained_layer(world, rng, activation="relu")
    twin = copy.deepcopy(layer)
    for each in layer, twin:
        each(x, residual=x if residual else None)
    before = snapshot(layer)
    last = world.size - 1
    with raises_on(world, [last], error, message):
        layer.backward(make(x) if world.rank == last else x)
    assert_unchanged(layer, before)
    # The forward is still there: the right gradient can follow.
    actual, expected = layer.backward(x), twin.backward(x)
    for a, b in zip(actual, expected, strict=True) if residual else [(actual, expected)]:
        assert_identical(a, b)
    assert_trains_on(layer, twin, x)


@pytest.mark.parametrize("case", BACKWARD)
def test_bad_gradient_in_eval_is_the_ranks_own(world, rng, case):
    make, error, message = BACKWARD[case]
    layer, x = trained_layer(world, rng)
    layer.eval()(x)
    before = snapshot(layer)
    if world.rank == 0:
        with pytest.raises(error, match=message):
            layer.backward(make(x))
    assert_unchanged(layer, before)


# name: (arguments of the function, error, message)
ARGUMENTS = {
    "activation": ({"activation": "gelu"}, ValueError, "gelu"),
    "slope": ({"activation": ("leaky_relu", 0.1, 0.2)}, ValueError, "leaky_relu"),
    "eps": ({"eps": -1e-5}, ValueError, "eps"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps"),
    "momentum": ({"momentum": 1.5}, ValueError, "momentum"),
    "momentum_none": ({"momentum": None}, ValueError, "num_batches_tracked"),
    "weight_shape": ({"bias": np.ones(C - 1, "f4")}, ValueError, "bias"),
    "weight_2d": ({"bias": np.ones((C, 1), "f4")}, ValueError, "bias"),
    "weight_dtype": ({"weight": np.ones(C, "f8")}, TypeError, "weight.*float64"),
    "weight_list": ({"bias": [0.0] * C}, TypeError, "list"),
    "running_var_shape": ({"running_var": np.ones(C + 1, "f4")}, ValueError, "running_var"),
    "running_var_dtype": ({"running_var": np.ones(C, "f8")}, TypeError, "running_var.*float64"),
    "running_var_byte_order": ({"running_var": np.ones(C, ">f4")}, TypeError, "running_var.*>f4"),
    "running_mean_alone": ({"running_var": None}, ValueError, "running_var"),
    "num_batches_tracked_dtype": ({"num_batches_tracked": np.zeros((), "f4")}, ValueError, "num_batches"),
    "num_batches_tracked_shape": ({"num_batches_tracked": np.zeros(1, "i8")}, ValueError, "num_batches"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_of_one_rank(world, rng, case):
    arguments, error, message = ARGUMENTS[case]
    x = random_batch(rng, (12, C, 3))[world.part(12)]
    weight, bias = random_channels(rng, C)
    arrays = {"weight": weight, "bias": bias, "running_mean": bias.copy(), "running_var": weight**2}
    copies = {name: array.copy() for name, array in arrays.items()}
    last = world.size - 1
    with raises_on(world, [last], error, message):
        sync_batch_norm(x, **(arrays | arguments if world.rank == last else arrays))
    for name, array in arrays.items():
        assert_identical(array, copies[name])


def test_bad_grad_reduction_of_one_rank(world, rng):
    x = random_batch(rng, (12, C, 3))[world.part(12)]
    _, saved = sync_batch_norm(x)
    last = world.size - 1
    with raises_on(world, [last], ValueError, "max"):
        sync_batch_norm_backward(x, saved, grad_reduction="max" if world.rank == last else "none")


def test_output_over_input_leaves_no_backward(rng):
    """In eval y may be written over x, which the backward misses then."""
    layer = SyncBatchNorm(C).eval()
    x = random_array(rng, (6, C))
    expected = layer(x)
    assert layer(x, out=x) is x
    assert_identical(x, expected)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="out"):
        layer.backward(x)
    assert_unchanged(layer, before)


def test_all_ranks_empty(rng):
    """No data is no error, and no reason to change anything."""
    layer = SyncBatchNorm(C)
    layer.running_mean[...], layer.running_var[...], layer.num_batches_tracked[...] = 2, 3, 4
    before = snapshot(layer)
    x = np.empty((0, C, 5), "f4")
    assert layer(x).shape == layer.backward(x).shape == x.shape
    for parameter in layer.parameters():
        assert_identical(parameter.grad, np.zeros(C, "f4"))
    layer.zero_grad()
    assert_unchanged(layer, before)


def assert_mismatch(world, layer, x, call):
    """Expect that all ranks find out that they have run apart, and go on together afterwards."""
    before, twin = snapshot(layer), copy.deepcopy(layer)
    if world.size == 1:
        call()
        return
    with pytest.raises(RankMismatchError):
        call()
    assert_unchanged(layer, before)
    assert_trains_on(layer, twin, x)


def test_ranks_in_different_layers(world, rng):
    layer, x = trained_layer(world, rng, name="first")
    other = SyncBatchNorm(C, name="second")
    other(x)
    before = snapshot(other)
    assert_mismatch(world, layer, x, lambda: (other if world.rank == 0 else layer)(x))
    if world.size > 1:
        assert_unchanged(other, before)


def test_ranks_in_different_steps(world, rng):
    """A rank that has skipped a batch is found out in the next."""
    layer, x = trained_layer(world, rng)
    ahead = copy.deepcopy(layer)
    ahead.backward(ahead(x))
    assert_mismatch(world, layer, x, lambda: (ahead if world.rank == 0 else layer)(x))


@pytest.mark.parametrize(
    "arguments", [{"num_features": C + 1}, {"num_features": 100 * C}, {"dtype": "float64"}], ids=str
)
def test_ranks_with_different_layers(world, rng, arguments):
    arguments = {"num_features": C, "name": "stem"} | (arguments if world.rank == world.size - 1 else {})
    layer = SyncBatchNorm(**arguments)
    before = snapshot(layer)
    x = random_array(rng, (6, layer.num_features), layer.dtype)
    if world.size == 1:
        layer(x)
        return
    with pytest.raises(RankMismatchError, match=r"stem"):
        layer(x)
    assert_unchanged(layer, before)


def test_messages_end_in_a_remedy(rng):
    layer = SyncBatchNorm(C)
    for x, remedy in (
        (random_array(rng, (6, 3)), "num_features"),
        (random_array(rng, (6, C), "f8"), "astype"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            layer(x)
        assert re.search(remedy, str(caught.value))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_read_only_statistics(world, name):
    """They are refused before the exchange: after it the other ranks would go on."""
    layer, x = SyncBatchNorm(3), np.ones((4, 3), "f4")
    layer(x)
    state = snapshot(layer)
    buffer = getattr(layer, name)
    buffer.flags.writeable = world.rank != 0
    expected = ValueError if world.rank == 0 else RemoteRankError
    with pytest.raises(expected, match=f"writeable array as {name}" if world.rank == 0 else "rank 0"):
        layer(x)
    assert_unchanged(layer, state)
    layer.eval()(x)
    buffer.flags.writeable = True
    layer.train()(x)
