"""Checks of arguments: one function per argument; errors say what was expected, what came, and a remedy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupy_syncbn.arrays import Array, check_writeable, module_of, type_name
from cupy_syncbn.backends import backend_of
from cupy_syncbn.backends.interface import Backend
from cupy_syncbn.backends.layout import Layout

Activation = str | tuple[str, float] | None

GRAD_REDUCTIONS = ("none", "sum", "mean")
DATA_TYPES = ("float16", "bfloat16", "float32", "float64")
LEAKY_SLOPE = 0.01
"""Slope of "leaky_relu" below zero, as in torch.nn.LeakyReLU."""


@functools.cache
def is_data_type(dtype: np.dtype[Any]) -> bool:
    """Tell whether data may have a type; cached, as NumPy takes its time to name a type."""
    return dtype.name in DATA_TYPES


def check_data_type(dtype: np.dtype[Any]) -> None:
    """Raise TypeError unless data may have a type."""
    if not is_data_type(dtype):
        raise TypeError(f"expected x of type {', '.join(DATA_TYPES)} (got {dtype}): use x.astype(...)")


def check_grad_reduction(grad_reduction: str) -> None:
    """Raise ValueError unless gradients can be reduced so."""
    if grad_reduction not in GRAD_REDUCTIONS:
        raise ValueError(f"expected grad_reduction 'none', 'sum' or 'mean' (got {grad_reduction!r})")


def check_settings(eps: float, momentum: float | None) -> None:
    """Raise ValueError if a setting is out of its range."""
    if not eps >= 0:
        raise ValueError(f"expected eps of at least 0 (got {eps!r})")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"expected momentum between 0 and 1, or None (got {momentum!r})")


def check_input(x: Array, channels_last: bool, channels: int) -> tuple[Backend, Layout]:
    """Check that `x` is a batch of so many channels; return its backend and its layout."""
    backend = backend_of(x)
    backend.check_device(x)
    check_data_type(x.dtype)
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


def check_types(name: str, dtype: np.dtype[Any], x_type: np.dtype[Any]) -> None:
    """Raise TypeError unless parameters have the type of the data, or float32 for 16-bit data."""
    if dtype == x_type:
        return
    check_data_type(x_type)
    x_type = x_type.newbyteorder("=")
    if dtype != x_type and not (x_type.itemsize == 2 and dtype == np.float32):
        wanted = x_type.name if x_type.itemsize > 2 else f"float32 or {x_type.name}"
        raise TypeError(
            f"expected {name} of type {wanted} for {x_type.name} data (got {dtype}): "
            f"use x.astype({dtype.name!r}), or {name} of type {x_type.name}"
        )


def check_backend(backend: Backend, name: str, array: Array) -> None:
    """Check that an array is on the device of the input."""
    if backend_of(array) is not backend:
        raise TypeError(
            f"expected {name} on the device of the input (got {type_name(array)}): "
            "use cupy.asarray or cupy.asnumpy, or the layer's .to(device)"
        )
    backend.check_device(array)


def check_layer(
    x: Array, layer_array: Array | None, dimensions: tuple[int, ...] | None, dtype: np.dtype[Any]
) -> None:
    """Check that `x` is on the device of a layer, which has `layer_array`, and its axes and its type."""
    if layer_array is not None and backend_of(x) is not backend_of(layer_array):
        here, there = ("cpu", "cuda") if module_of(layer_array) is np else ("cuda", "cpu")
        raise TypeError(
            f"expected the input on the layer's device, {here} (got {module_of(x).__name__}.ndarray): "
            f"move the layer by .to({there!r}), or the input by cupy.asarray or .get()"
        )
    backend_of(x)  # raises an error for other objects
    if dimensions and x.ndim not in dimensions:
        wanted = " or ".join(f"{n}D" for n in dimensions)
        raise ValueError(f"expected {wanted} input (got {x.ndim}D input)")
    check_types("the layer", dtype, x.dtype)


def check_parameter(backend: Backend, name: str, values: Array, x_type: Any, channels: int) -> None:
    """Check that an array has one value per channel, of a type that goes with the data."""
    check_backend(backend, name, values)
    if values.shape != (channels,):
        raise ValueError(f"expected {name} of shape ({channels},) (got {values.shape})")
    check_types(name, values.dtype, x_type)


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
        check_backend(backend, "num_batches_tracked", tracked)
        if tracked.shape != () or tracked.dtype != np.int64:
            raise ValueError(f"expected num_batches_tracked to be a 0-d int64 array (got {tracked!r})")


def check_like(
    backend: Backend, name: str, array: Array, model: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Check that an array has the device, shape and type of its model: the input or the output."""
    check_backend(backend, name, array)
    if array.shape != shape:
        raise ValueError(f"expected {name} of the {model}'s size {shape} (got {array.shape})")
    if array.dtype.newbyteorder("=") != dtype.newbyteorder("="):
        raise TypeError(f"expected {name} of the {model}'s type {dtype.name} (got {array.dtype})")


def check_out(backend: Backend, out: Array, x: Array, residual: Array | None, training: bool) -> None:
    """Check that `out` can be written to while the other arrays are read."""
    check_writeable("out", out)
    if backend.overlaps(out, x) and (training or out is not x):
        raise ValueError(
            "expected out to share no memory with the input (without training it may be the input)"
        )
    if residual is not None and backend.overlaps(out, residual):
        raise ValueError("expected out to share no memory with residual")


def activation_slope(activation: Activation) -> float | None:
    """Return the slope of an activation below zero, or None for no activation."""
    if activation is None:
        return None
    name, *rest = (activation,) if isinstance(activation, str) else activation
    if name == "relu" and not rest:
        return 0.0
    if name == "leaky_relu" and len(rest) < 2:
        slope = float(rest[0]) if rest else LEAKY_SLOPE
        if 0 < slope < 1:
            return slope
    raise ValueError(
        "expected activation None, 'relu', 'leaky_relu' or ('leaky_relu', slope between 0 and 1) "
        f"(got {activation!r})"
    )


def data_type(dtype: Any) -> np.dtype[Any]:
    """Return the type of parameters and buffers that an argument `dtype` means."""
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    result: np.dtype[Any] = np.dtype(dtype)
    if not is_data_type(result):
        raise TypeError(f"expected dtype to be one of {', '.join(DATA_TYPES)} (got {dtype!r})")
    return result
