"""Errors of arguments: each names the argument, what it got and what it takes, and its remedy works."""

import re
import sys

import numpy as np
import pytest

import cupy_syncbn
from cupy_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    RemoteRankError,
    SyncBatchNorm,
    sync_batch_norm,
    sync_batch_norm_backward,
)
from support.arrays import BFLOAT16, random_array, random_batch
from support.compare import assert_identical

C = 4
SHAPE = (6, C, 3)


def remedy_of(error, words=r"use (.*?)(?:,|: | \(of|$)"):
    """Return the expression or the statement that a message says to use."""
    return re.search(words, str(error)).group(1)


def raised(error, match, call, *arguments, **keywords):
    with pytest.raises(error, match=match) as caught:
        call(*arguments, **keywords)
    return caught.value


def channels_of(engine, request):
    """Return the library of an engine, and its name as the device of a layer."""
    return (np, "cpu") if engine == "numpy" else (request.getfixturevalue("cupy"), "cuda")


@pytest.fixture(params=["numpy", "cupy"])
def engine(request):
    return channels_of(request.param, request)


# Types of x and of the layer


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("given", "layer_type"),
    [
        ("float64", "float32"),
        ("float32", "float64"),
        ("float32", "float16"),
        ("bfloat16", "float16"),
        ("int64", "float32"),
        ("bool", "float64"),
        ("uint8", "float16"),
    ],
)
def test_x_of_another_type_than_the_layer(rng, engine, given, layer_type):
    xp, device = engine
    layer = BatchNorm1d(C, dtype=layer_type, device=device)
    x = xp.asarray(random_batch(rng, SHAPE).astype(BFLOAT16 if given == "bfloat16" else given))
    is_data = given[0] in "fb" and given != "bool"
    start = f"x is {given}, but this layer is {layer_type}: " if is_data else rf"\(got {given}\)"
    error = raised(TypeError, start, layer, x)
    y = layer(eval(remedy_of(error), {"x": x}))
    assert y.dtype == layer_type
    if is_data:
        other = BatchNorm1d(C, dtype=remedy_of(error, "dtype='(.*)'"), device=device)
        assert other(x).dtype == x.dtype


@pytest.mark.mpi_skip
@pytest.mark.parametrize("argument", ["x", "residual", "dy"])
def test_torch_tensor_of_another_type(rng, argument):
    torch = pytest.importorskip("torch", reason="gives torch tensors, and torch is not installed")
    layer = BatchNorm1d(C)
    given = {name: random_batch(rng, SHAPE) for name in ("x", "residual", "dy")}
    given[argument] = torch.from_numpy(given[argument]).double()

    def step():
        layer.forget()
        layer(given["x"], residual=given["residual"])
        layer.backward(given["dy"])

    error = raised(TypeError, "float64", step)
    remedy = remedy_of(error, rf"({argument}\.to\(torch\.float32\))")
    given[argument] = eval(remedy, {"torch": torch, argument: given[argument]})
    step()


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_dy_and_residual_of_another_type(world, rng, dtype):
    layer, x = SyncBatchNorm(C), random_batch(rng, SHAPE)
    residual, dy = random_array(rng, SHAPE).astype(dtype), random_array(rng, SHAPE).astype(dtype)
    error = raised(TypeError, rf"residual of the input's type float32 \(got {dtype}\)", layer, x, residual)
    layer(x, eval(remedy_of(error), {"residual": residual}))
    error = raised(TypeError, rf"dy of the output's type float32 \(got {dtype}\)", layer.backward, dy)
    layer.backward(eval(remedy_of(error), {"dy": dy}))


@pytest.mark.mpi_skip
def test_out_of_another_type(rng, engine):
    xp, device = engine
    layer, x = BatchNorm1d(C, device=device), xp.asarray(random_batch(rng, SHAPE))
    error = raised(TypeError, "out of the input's type", layer, x, out=xp.empty(SHAPE, "f8"))
    out = eval(remedy_of(error, r"use (.*)"), {xp.__name__: xp, "cupy": xp})
    assert layer(x, out=out) is out


# What is assigned to a layer's arrays


def follow(error, layer):
    """Do what a message says to a layer's array."""
    name, expression = remedy_of(error, r"use ([\w.]+ = .*?)(?:,|$)").split(" = ")
    names = {"numpy": np, "cupy": sys.modules.get("cupy"), "running_mean": layer.running_mean}
    names |= {"running_var": layer.running_var, "weight": layer.weight, "bias": layer.bias}
    holder, attribute = (getattr(layer, name[:-5]), "data") if name.endswith(".data") else (layer, name)
    setattr(holder, attribute, eval(expression, names))


@pytest.mark.mpi_skip
@pytest.mark.parametrize("layer_type", ["float32", "float16", "float64"])
def test_updates_that_change_the_type(rng, engine, layer_type):
    """As of a rate that NumPy has computed: NumPy 2 makes the product float64."""
    xp, device = engine
    layer = BatchNorm1d(C, dtype=layer_type, device=device)
    x = xp.asarray(random_batch(rng, SHAPE, layer_type))
    layer.backward(layer(x))
    wrong = "float32" if layer_type == "float64" else "float64"
    for parameter in layer.weight, layer.bias:
        parameter.data = parameter.data.astype(wrong)
    for name in "weight.data", "bias.data":
        follow(raised(TypeError, f"^{name} is {wrong}, but this layer is {layer_type}", layer, x), layer)
    layer(x)
    # The other remedy.
    layer.weight.data[...] = layer.weight.data - np.float64(0.1) * layer.weight.data.astype("f8")
    layer(x)


@pytest.mark.parametrize("name", ["weight.data", "bias.data"])
@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0, 4.0], (1.0,) * C, 1.5, np.float64(2)], ids=repr)
def test_lists_and_numbers_as_a_layers_array(world, rng, name, value):
    layer, x = SyncBatchNorm(C), random_batch(rng, SHAPE)
    layer(x)
    holder, attribute = getattr(layer, name[:-5]), "data"
    usual = getattr(holder, attribute)
    last = world.size - 1
    if world.rank == last:
        setattr(holder, attribute, value)
        kind = type(value).__name__
        error = raised(
            TypeError, rf"expected {name} to be a NumPy or CuPy array \(got (numpy\.)?{kind}\)", layer, x
        )
        expression = remedy_of(error, "use (.*)").replace(name, "value")
        setattr(holder, attribute, eval(expression, {"numpy": np, "value": value}))
        assert_identical(getattr(holder, attribute), np.full(C, value, "f4"))
        layer.process_group, usual = layer.process_group, getattr(holder, attribute)
    else:
        raised(RemoteRankError, f"rank {last} failed", layer, x)
        layer.process_group = layer.process_group
    setattr(holder, attribute, usual)
    layer(x)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0, 4.0], 1.5], ids=repr)
def test_lists_and_numbers_as_arrays_of_a_layer_on_a_gpu(rng, cupy, value):
    layer, x = BatchNorm1d(C, device="cuda"), cupy.asarray(random_batch(rng, SHAPE))
    layer.weight.data = layer.bias.data = value
    for name in "weight.data", "bias.data":
        error = raised(TypeError, f"expected {name} to be a NumPy or CuPy array", layer, x)
        expression = remedy_of(error, "use (.*)").replace(name, "value")
        getattr(layer, name[:-5]).data = eval(expression, {"cupy": cupy, "value": value})
    layer(x)
    raised(TypeError, r"expected x to be .*use cupy\.asarray\(x, 'float32'\)", layer, x.get().tolist())
    layer.weight.data = np.ones(C, "f4")
    raised(TypeError, r"input on the layer's device", layer, x)


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "value", [5, np.int64(5), [5], np.float32(5), np.array([5]), np.array(5.0)], ids=repr
)
def test_counter_that_is_no_array(rng, value):
    arguments = {"running_mean": np.zeros(C, "f4"), "running_var": np.ones(C, "f4")}
    arguments |= {"x": random_batch(rng, SHAPE), "num_batches_tracked": value}
    error = raised((TypeError, ValueError), "num_batches_tracked to be a", sync_batch_norm, **arguments)
    assert "'int64'" in str(error)
    arguments["num_batches_tracked"] = np.asarray(5, "int64")
    sync_batch_norm(**arguments)
    assert arguments["num_batches_tracked"] == 6


@pytest.mark.mpi_skip
def test_parameters_of_the_functions(rng):
    x, weight, mean, var = random_batch(rng, SHAPE), np.ones(C), np.zeros(C), np.ones(C)
    arguments = {"weight": weight, "running_mean": mean, "running_var": var}
    for name in arguments:
        error = raised(TypeError, f"^{name} is float64, but x is float32", sync_batch_norm, x, **arguments)
        assert remedy_of(error) == f"{name} = {name}.astype('float32')"
        if name == "weight":  # and all others are float64 still
            sync_batch_norm(eval(remedy_of(error, r"or (x\..*?\))"), {"x": x}), **arguments)
        arguments[name] = arguments[name].astype("float32")
    sync_batch_norm(x, **arguments)
    error = raised(TypeError, "^weight is int64", sync_batch_norm, x, np.ones(C, int))
    assert "or x" not in str(error)
    weight, bias = np.ones(C, "f4"), np.ones(3, "f4")
    error = raised(ValueError, r"bias of shape \(4,\) \(got \(3,\)\)", sync_batch_norm, x, weight, bias)
    sync_batch_norm(x, weight, eval(remedy_of(error, "as (numpy.*)"), {"numpy": np, "value": 2}))


@pytest.mark.mpi_skip
@pytest.mark.parametrize("name", ["x", "residual", "out", "weight", "running_var"])
def test_lists_as_arguments_of_the_functions(rng, name):
    x = random_batch(rng, SHAPE)
    arguments = {"x": x, "residual": x, "out": np.empty_like(x), "weight": np.ones(C, "f4")}
    arguments |= {"running_mean": np.zeros(C, "f4"), "running_var": np.ones(C, "f4")}
    error = raised(
        TypeError,
        rf"expected {name} to be a NumPy or CuPy array \(got list\)",
        sync_batch_norm,
        **arguments | {name: arguments[name].tolist()},
    )
    given = {name: arguments[name].tolist(), "numpy": np}
    y, saved = sync_batch_norm(**arguments | {name: eval(remedy_of(error, "use (.*)"), given)})
    error = raised(TypeError, "expected dy to be", sync_batch_norm_backward, y.tolist(), saved)
    dy = eval(remedy_of(error, "use (.*)"), {"dy": y.tolist(), "numpy": np})
    sync_batch_norm_backward(dy, saved)


# Arguments of layers


class Noise:
    """Has no number and no text to it."""

    def __repr__(self):
        return "Noise()"


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "value", ["16", 16.0, "c", [3] * 999, np.ones((2, 3)), None, Noise()], ids=lambda value: repr(value)[:9]
)
@pytest.mark.parametrize("layer_class", [SyncBatchNorm, BatchNorm2d])
def test_num_features(layer_class, value):
    error = raised(TypeError, r"expected num_features to be an integer \(got .*use int\(", layer_class, value)
    assert len(str(error)) < 300
    if isinstance(value, str | float) and value != "c":
        assert layer_class(int(value)).num_features == 16
    assert layer_class(np.int16(3)).num_features == layer_class(np.array(3)).num_features == 3


@pytest.mark.mpi_skip
@pytest.mark.parametrize("name", ["eps", "momentum"])
@pytest.mark.parametrize("value", ["1e-5", b"1", [0.1], np.ones(2), 1j, Noise()], ids=repr)
def test_numbers(rng, name, value):
    error = raised(TypeError, rf"expected {name} to be a number \(got ", BatchNorm1d, C, **{name: value})
    raised(TypeError, f"expected {name}", sync_batch_norm, random_batch(rng, SHAPE), **{name: value})
    if isinstance(value, str):
        BatchNorm1d(C, **{name: eval(remedy_of(error), {name: value})})
    for right in 1, 0.5, np.float32(0.5), np.int64(1), True:
        BatchNorm1d(C, **{name: right})(random_batch(rng, SHAPE))


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.tanh, TypeError),
        (3, TypeError),
        ((), TypeError),
        ((0.1, "leaky_relu"), TypeError),
        (max, TypeError),
        ("gelu", ValueError),
        (("leaky_relu", "0.1"), ValueError),
        (("leaky_relu", 1), ValueError),
        (("leaky_relu", np.nan), ValueError),
        (("relu", 0.1), ValueError),
    ],
)
def test_activation(rng, value, kind):
    match = "expected activation None, 'relu', .*apply another function to y, and its derivative to dy"
    raised(kind, match, BatchNorm1d, C, activation=value)
    raised(kind, match, sync_batch_norm, random_batch(rng, SHAPE), activation=value)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("value", ["fp8", "int8", int, "complex64", None, 7, Noise, "float128"], ids=repr)
def test_types_that_are_none_of_data(value):
    raised(
        TypeError,
        "expected dtype to be one of float16, bfloat16, float32, float64",
        BatchNorm1d,
        C,
        dtype=value,
    )


@pytest.mark.mpi_skip
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_types_of_torch(name):
    torch = pytest.importorskip("torch", reason="has types of its own, and torch is not installed")
    assert BatchNorm1d(C, dtype=getattr(torch, name)).weight.data.dtype.name == name
    raised(TypeError, "got torch.int64", BatchNorm1d, C, dtype=torch.int64)
    raised(TypeError, "got torch.complex64", BatchNorm1d, C, dtype=torch.complex64)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("value", ["gpu", "CPU", "cuda:1", "0"])
def test_device(monkeypatch, value):
    raised(
        ValueError, rf"expected device 'cpu', 'cuda' or None \(got '{value}'\)", BatchNorm1d, C, device=value
    )
    monkeypatch.setenv("CUPY_SYNCBN_DEVICE", value)
    raised(ValueError, rf"CUPY_SYNCBN_DEVICE to be 'cpu' or 'cuda' \(got '{value}'\)", BatchNorm1d, C)
    assert type(BatchNorm1d(C, device="cpu").weight.data) is np.ndarray
    assert cupy_syncbn.SyncBatchNorm(C, device="cpu").eval()(np.ones((2, C), "f4")).shape == (2, C)
