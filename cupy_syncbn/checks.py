"""Checks of arguments: one function per argument; errors say what was expected, what came, and a remedy."""

from __future__ import annotations

import contextlib
import functools
import numbers
import operator
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array, check_writeable, is_cupy, is_torch, module_of, type_name
from cupy_syncbn.backends import backend_of
from cupy_syncbn.backends.interface import Backend
from cupy_syncbn.backends.layout import Layout

Activation = str | tuple[str, float] | None

GRAD_REDUCTIONS = ("none", "sum", "mean")
DATA_TYPES = ("float16", "bfloat16", "float32", "float64")
_LONGEST_SHOWN = 100  # characters of a value in an error
LEAKY_SLOPE = 0.01
"""Slope of "leaky_relu" below zero, as in torch.nn.LeakyReLU."""
LEAST_SLOPE = 1e-3
"""In place: times a smaller one, float16 has values near zero as subnormal numbers, or none."""


@functools.cache
def is_data_type(dtype: np.dtype[Any]) -> bool:
    """Tell whether data may have a type; cached, as NumPy takes its time to name a type."""
    return dtype.name in DATA_TYPES


def check_data_type(x: Array, dtype: str = "float32") -> None:
    """Raise TypeError unless data may have the type of `x`; `dtype` is one that would go with the rest."""
    if not is_data_type(x.dtype):
        types = ", ".join(DATA_TYPES)
        raise TypeError(f"expected x of type {types} (got {x.dtype}): use {_cast('x', dtype)}")


def check_grad_reduction(grad_reduction: str) -> None:
    """Raise ValueError unless gradients can be reduced so."""
    if grad_reduction not in GRAD_REDUCTIONS:
        raise ValueError(f"expected grad_reduction 'none', 'sum' or 'mean' (got {grad_reduction!r})")


def check_settings(eps: float, momentum: float | None) -> None:
    """Raise TypeError if a setting is no number, ValueError if it is out of its range."""
    _check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"expected eps of at least 0 (got {eps!r})")
    if momentum is not None:
        _check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise ValueError(f"expected momentum between 0 and 1, or None (got {momentum!r})")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number (got {_shown(value)}): use float({name})")


def number_of_channels(num_features: Any) -> int:
    """Return an argument `num_features` as an int of at least 1."""
    try:
        channels = operator.index(num_features)
    except TypeError:
        raise TypeError(
            f"expected num_features to be an integer (got {_shown(num_features)}): use int(num_features), or "
            "the length of an axis, as x.shape[1]"
        ) from None
    if channels < 1:
        raise ValueError(f"expected num_features of at least 1 (got {channels})")
    return channels


def check_input(
    x: Array, channels_last: bool, channels: int, others: tuple[Array | None, ...]
) -> tuple[Backend, Layout]:
    """Check that `x` is a batch of so many channels; return its backend and its layout.

    `others` are arrays that go with it, by which an error tells what it should be.
    """
    known = [each for each in others if each is not None and is_array(each)]
    dtype = next((each.dtype.name for each in known if is_data_type(each.dtype)), "float32")
    backend = _backend_for("x", x, _library(known), dtype)
    backend.check_device(x)
    check_data_type(x, dtype)
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    axis = x.ndim - 1 if channels_last else 1
    if x.shape[axis] != channels:
        raise ValueError(
            f"expected {channels} channels on axis {axis} (got input size {x.shape}): "
            "set num_features to the channels of the data, or channels_last if they are its last axis"
        )
    if channels == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    return backend, Layout.of(x, channels_last)


def is_array(value: object) -> bool:
    """Tell whether a value is an array of NumPy or CuPy."""
    return isinstance(value, np.ndarray) or is_cupy(value)


def _library(arrays: Iterable[object]) -> str:
    """Return "cupy" if there is an array on a GPU, else "numpy"."""
    return "cupy" if any(map(is_cupy, arrays)) else "numpy"


def _backend_for(name: str, value: object, library: str, dtype: str) -> Backend:
    """Return the backend of an argument, which should be an array of a library and a type."""
    if is_array(value):
        return backend_of(value)
    remedy = "convert it, for instance with numpy.asarray or cupy.asarray"
    if is_torch(value):
        given = f"{name}.detach()"
        remedy = f"use {given}.numpy()" if library == "numpy" else f"use cupy.from_dlpack({given})"
    elif isinstance(value, list | tuple | numbers.Number):
        remedy = f"use {library}.asarray({name}, {dtype!r})"
    raise TypeError(f"expected {name} to be a NumPy or CuPy array (got {type_name(value)}): {remedy}")


def check_backend(backend: Backend, name: str, array: Array, library: str, dtype: str) -> None:
    """Check that an array is on the device of the input, whose library is named."""
    if _backend_for(name, array, library, dtype) is not backend:
        raise TypeError(
            f"expected {name} on the device of the input (got {type_name(array)}): "
            "use cupy.asarray or cupy.asnumpy, or the layer's .to(device)"
        )
    backend.check_device(array)


def goes_with(dtype: np.dtype[Any], x_type: np.dtype[Any]) -> bool:
    """Tell whether parameters have the type of the data, or float32 for 16-bit data."""
    native = x_type.newbyteorder("=")
    return dtype in (x_type, native) or (native.itemsize == 2 and dtype == np.float32)


def check_layer(
    x: Array, layer_array: Array | None, dimensions: tuple[int, ...] | None, dtype: np.dtype[Any]
) -> None:
    """Check that `x` is on the device of a layer, which has `layer_array`, and its axes and its type."""
    library = _library([layer_array])
    backend = _backend_for("x", x, library, dtype.name)
    if is_array(layer_array) and backend is not backend_of(layer_array):
        here, there = ("cpu", "cuda") if library == "numpy" else ("cuda", "cpu")
        raise TypeError(
            f"expected the input on the layer's device, {here} (got {module_of(x).__name__}.ndarray): "
            f"move the layer by .to({there!r}), or the input by cupy.asarray or .get()"
        )
    if dimensions and x.ndim not in dimensions:
        wanted = " or ".join(f"{n}D" for n in dimensions)
        raise ValueError(f"expected {wanted} input (got {x.ndim}D input)")
    check_data_type(x, dtype.name)
    if not goes_with(dtype, x.dtype):
        other = "float32" if x.dtype.itemsize == 2 else x.dtype.name
        raise TypeError(
            f"x is {x.dtype.name}, but this layer is {dtype.name}: use {_cast('x', dtype.name)}, "
            f"or make the layer with dtype={other!r}"
        )


def check_parameter(
    backend: Backend, name: str, values: Array, x: Array, channels: int, layer_type: np.dtype[Any] | None
) -> None:
    """Check that an array has one value per channel, of a type that goes with the data.

    `layer_type` is that of the layer whose array it is, or None.
    """
    x_type = x.dtype.newbyteorder("=")
    wanted = layer_type or (x_type if x_type.itemsize > 2 else np.dtype(np.float32))
    library = _library([x])
    if isinstance(values, numbers.Number):
        raise TypeError(
            f"expected {name} to be a NumPy or CuPy array (got {type_name(values)}): "
            f"use {library}.full({channels}, {name}, {wanted.name!r})"
        )
    check_backend(backend, name, values, library, wanted.name)
    if values.shape != (channels,):
        raise ValueError(
            f"expected {name} of shape ({channels},) (got {values.shape}): give one value per channel, as "
            f"{library}.full({channels}, value, {wanted.name!r})"
        )
    if goes_with(values.dtype, x.dtype):
        return
    cast = f"{name} = {name}.astype({wanted.name!r})"
    if layer_type is not None:
        raise TypeError(
            f"{name} is {values.dtype}, but this layer is {layer_type.name}: an update has changed its type; "
            f"use {cast}, and update in place, as by {name}[...] = new"
        )
    is_possible = is_data_type(values.dtype) and values.dtype.isnative
    alternative = f", or {_cast('x', values.dtype.name)}" if is_possible else ""
    raise TypeError(f"{name} is {values.dtype}, but x is {x.dtype}: use {cast}{alternative}")


def check_running(
    backend: Backend, mean: Array | None, var: Array | None, tracked: Array | None, momentum: float | None
) -> None:
    """Check that the running statistics and the counter go together; all else is as for parameters."""
    if mean is None or var is None:
        if mean is not var:
            raise ValueError("expected running_mean and running_var together (got one of them)")
        return
    if tracked is None and momentum is None:
        raise ValueError("expected num_batches_tracked with momentum=None, the average over all batches")
    if tracked is not None:
        library = _library([mean])
        check_backend(backend, "num_batches_tracked", tracked, library, "int64")
        if tracked.shape != () or tracked.dtype != np.int64:
            raise ValueError(
                f"expected num_batches_tracked to be a 0-d int64 array (got {_shown(tracked)}): "
                f"use {library}.asarray(count, 'int64'), of a number"
            )


class Model(NamedTuple):
    """The input or the output: what an array is to be like."""

    name: str
    backend: Backend
    library: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def check_like(name: str, array: Array, model: Model) -> None:
    """Check that an array has the device, shape and type of its model."""
    dtype = model.dtype.newbyteorder("=")
    check_backend(model.backend, name, array, model.library, dtype.name)
    if array.shape != model.shape:
        raise ValueError(f"expected {name} of the {model.name}'s size {model.shape} (got {array.shape})")
    if array.dtype.newbyteorder("=") != dtype:
        made = f"{model.library}.empty({model.shape}, {dtype.name!r})"
        raise TypeError(
            f"expected {name} of the {model.name}'s type {dtype.name} (got {array.dtype}): "
            f"use {made if name == 'out' else _cast(name, dtype.name)}"
        )


def check_out(backend: Backend, out: Array, x: Array, residual: Array | None, training: bool) -> None:
    """Check that `out` can be written to while the other arrays are read."""
    check_writeable("out", out)
    if backend.overlaps(out, x) and (training or out is not x):
        raise ValueError(
            "expected out to share no memory with the input (without training it may be the input): call it "
            "without out, or with inplace=True"
        )
    if residual is not None and backend.overlaps(out, residual):
        raise ValueError("expected out to share no memory with residual")


def check_gradient_out(backend: Backend, out: Array, dy: Array, x: Array) -> None:
    """Check that `out` of a backward can be written to while the other arrays are read."""
    check_writeable("out", out)
    if out is not dy and backend.overlaps(out, dy):
        raise ValueError("expected out to be dy, or to share no memory with it")
    if backend.overlaps(out, x):
        raise ValueError("expected out to share no memory with what the forward has kept, its x or y")


def check_no_overlap(name: str, array: Array) -> None:
    """Check that each value of an array that is written to has memory of its own."""
    span = array.itemsize if array.size else 0
    for step, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if step < span:
            raise ValueError(
                f"expected {name} without values that share memory (got strides of {array.strides} bytes at "
                f"a size of {array.shape}): use {name}.copy()"
            )
        span += step * (length - 1)


def check_inplace(activation: Activation, has_residual: bool, out: object, x: object) -> None:
    """Check that a normalization in place can be: its backward has to find x from y."""
    slope = activation_slope(activation)
    if slope == 0:
        raise ValueError(
            "expected activation None or 'leaky_relu' with inplace=True (got 'relu', which has no inverse): "
            "use ('leaky_relu', slope)"
        )
    if slope is not None and slope < LEAST_SLOPE:
        raise ValueError(
            f"expected a slope of at least {LEAST_SLOPE} with inplace=True (got {slope}, by which y keeps "
            "few digits of x): use a larger one, or inplace=False"
        )
    if has_residual:
        raise ValueError(
            "expected no residual with inplace=True (y alone does not tell x): add it to a copy of y, or use "
            "inplace=False"
        )
    if out is not None and out is not x:
        raise ValueError("expected no out with inplace=True, which writes y over x: call it without out")
    if x is not None and not (is_array(x) or is_torch(x)):
        raise TypeError(
            f"expected x of NumPy, CuPy or torch with inplace=True (got {type_name(x)}, which may not be "
            "written to): give a copy, such as numpy.array(x) or cupy.array(x)"
        )


def activation_slope(activation: Activation) -> float | None:
    """Return the slope of an activation below zero, or None for no activation."""
    if activation is None:
        return None
    name, *rest = activation if isinstance(activation, tuple | list) and activation else (activation,)
    if name == "relu" and not rest:
        return 0.0
    if name == "leaky_relu" and len(rest) < 2:
        slope = rest[0] if rest else LEAKY_SLOPE
        if isinstance(slope, numbers.Real) and 0 < slope < 1:
            return float(slope)
    error = ValueError if isinstance(name, str) else TypeError
    raise error(
        "expected activation None, 'relu', 'leaky_relu' or ('leaky_relu', slope between 0 and 1) "
        f"(got {_shown(activation)}): apply another function to y, and its derivative to dy"
    )


def data_type(dtype: Any) -> np.dtype[Any]:
    """Return the type of parameters and buffers that an argument `dtype` means."""
    # NumPy does not know torch.float32.
    name = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
    if isinstance(name, str) and name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    if name is not None:  # which NumPy takes for float64
        with contextlib.suppress(TypeError, ValueError):
            result: np.dtype[Any] = np.dtype(name).newbyteorder("=")
            if is_data_type(result):
                return result
    raise TypeError(f"expected dtype to be one of {', '.join(DATA_TYPES)} (got {_shown(dtype)})")


def _cast(name: str, dtype: str) -> str:
    """Return the expression that casts an array."""
    of_torch = f" (of a torch tensor {name}.to(torch.{dtype}))" if "torch" in sys.modules else ""
    return f"{name}.astype({dtype!r}){of_torch}"


def _shown(value: object) -> str:
    """Return a value as errors show it: an array by its type and shape, and what is long by its type."""
    if is_array(value) or is_torch(value):
        array: Any = value
        return f"{type_name(value)} of type {array.dtype} and shape {tuple(array.shape)}"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else type_name(value)
