"""Batch normalization in NumPy, on whole arrays: `backends.interface.Backend` as its formulas stand in books.

It computes where there is no compiled core, and is what the core is compared with. Let T be the type of the
data and A the accumulator's, float64 for float64 and float32 for the rest. What is done at each element is
rounded in A operation by operation, in the order written here, and once to T: so any implementation gives the
same bits. Sums over elements are float64; so are vectors (C,), which `_column` makes (C, 1) to go with
(N, C, S).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.backends.cpu.memory import output
from cupy_syncbn.backends.interface import (
    LEAST_WEIGHT,
    Affine,
    BatchSums,
    Epilogue,
    ParameterSums,
    Reduced,
    Running,
)
from cupy_syncbn.backends.vector import moments, round_to_12_bits

empty = output


def overlaps(a: Array, b: Array) -> bool:
    """Tell whether two arrays share memory."""
    return np.shares_memory(a, b)


def as_kernel_input(x: Array) -> Array:
    """Return `x`: strides do not matter here."""
    return x


def check_device(x: Array) -> None:
    """Check nothing: there is one device."""


def _accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return a parameter's or a running statistic's new values: by way of A, as the core and the kernels."""
    return values.astype(_accumulator(np.dtype(dtype))).astype(dtype)


def _column(values: Array) -> Array:
    column: Array = values[:, None]
    return column


def _sum(values: Array) -> Any:
    """Σ values per channel."""
    return np.sum(values, axis=(0, 2), dtype=np.float64)


def _sum_product(a: Array, b: Array) -> Any:
    """Σ ab per channel."""
    return np.einsum("ncs,ncs->c", a, b, dtype=np.float64)


class _LocalSums(NamedTuple):
    """Sums of one rank, about a shift for each channel."""

    n: int
    """Values per channel."""
    shift: Array
    sum: Array
    """Σ(x - shift)."""
    square: Array
    """Σ(x - shift)²."""


def statistics(x: Array, trailer: tuple[float, ...]) -> tuple[Array, _LocalSums]:
    """Reduce `x` to the vector of the forward: sums about the mean, moved to a pivot; see `vector`."""
    n = x.shape[0] * x.shape[2]
    shift = _sum(x) / max(n, 1)
    shift[~np.isfinite(n * shift * shift)] = 0  # NaN, or a square that overflows, is no pivot
    difference = np.subtract(x, _column(shift), dtype=np.float64)
    local = _LocalSums(n, shift, _sum(difference), _sum_product(difference, difference))

    pivot = round_to_12_bits(shift)
    distance = shift - pivot
    about_pivot = local.sum + n * distance  # Σ(x - pivot)
    square = local.square + distance * (local.sum + about_pivot)  # Σ(x - pivot)²
    sums = n * pivot, n * pivot * pivot, about_pivot, square + 2 * pivot * about_pivot
    return np.concatenate([*sums, [n, *trailer]]), local


def centered_squares(
    local_sums: _LocalSums, vector: Array, trailer: tuple[float, ...], mailbox: int
) -> Array:
    """Return the vector [Σ(x - mean)² (C) | trailer] about the mean over all ranks, for float64 data."""
    n, shift, sum_, square = local_sums
    mean, _, _ = moments(vector, shift.size)
    distance = mean - shift
    return np.concatenate([square - distance * (2 * sum_ - n * distance), trailer])


@dataclass(slots=True)
class _Normalization:
    """The step of a forward at each element: ``activation((x - shift) * scale + offset + residual)``.

    In place, the backward has z = (x - mean) * invstd * weight + bias for x, and finds it from y (Rota Bulò,
    Porzi and Kontschieder 2018). Mean and invstd are then those of z: bias and 1 / weight.
    """

    mean: Array
    """(C,) in float64, as are `invstd` and `distance`."""
    invstd: Array
    distance: Array
    """mean - shift."""
    shift: Array
    """The mean rounded to A; (C,) in A, as are `scale` and `offset`."""
    scale: Array
    offset: Array
    slope: Any
    """Slope of the activation below zero, in A; None for no activation."""
    count: float
    """Values per channel over all ranks; 0 where running statistics are used."""
    blocked: Array | None = None
    """A bit for each element: whether the activation multiplies it by the slope."""
    in_place: bool = False


def normalize(
    x: Array, y: Array, batch: BatchSums | None, running: Running | None, affine: Affine, epilogue: Epilogue
) -> tuple[_Normalization, list[Callable[[], object]]]:
    """Write y by the statistics of the batch, or without one by the running ones."""
    count = 0.0
    if batch is not None:
        mean, m2, count = moments(batch.vector, x.shape[1])
        if batch.squares is not None:
            m2 = batch.squares[: x.shape[1]]
        var = np.where(m2 < 0, 0, m2) / max(count, 1)  # NaN stays NaN
    else:
        assert running is not None  # so says `prepare`
        mean, var = running.mean.astype(np.float64), running.var.astype(np.float64)
    residual, slope, in_place = epilogue
    if in_place:
        affine = affine._replace(weight=_invertible(affine.weight))
    normalization = _normalization(mean, var, count, affine, slope, _accumulator(x.dtype))
    _apply(x, y, residual, normalization)
    if in_place:
        _invert(normalization, affine)
    if batch is None or running is None or not count:
        return normalization, []
    return normalization, _update(running, mean, var * (count / max(count - 1, 1)))


def _normalization(
    mean: Array, var: Array, count: float, affine: Affine, slope: float | None, dtype: np.dtype[Any]
) -> _Normalization:
    weight, bias, eps = affine
    invstd = 1 / np.sqrt(var + eps)
    factor = invstd if weight is None else invstd * weight
    shift = mean.astype(dtype)
    distance = mean - shift
    offset = (0 if bias is None else bias) - distance * factor
    in_type = None if slope is None else dtype.type(slope)
    return _Normalization(
        mean, invstd, distance, shift, factor.astype(dtype), offset.astype(dtype), in_type, count
    )


def _invertible(weight: Array | None) -> Array | None:
    """Return the weight that is used in place: with one closer to zero, y would tell nothing of x."""
    if weight is None:
        return None
    weight = weight.astype(np.float64)
    return np.where(abs(weight) < LEAST_WEIGHT, np.copysign(LEAST_WEIGHT, weight), weight)


def _invert(normalization: _Normalization, affine: Affine) -> None:
    """Turn the record of a forward into that of a normalization in place."""
    C, dtype = normalization.mean.size, normalization.shift.dtype
    bias = np.zeros(C) if affine.bias is None else affine.bias.astype(np.float64)
    normalization.mean, normalization.shift = bias, bias.astype(dtype)
    normalization.distance = bias - normalization.shift
    normalization.invstd = np.ones(C) if affine.weight is None else 1 / affine.weight
    normalization.blocked, normalization.in_place = None, True


def _input(x: Array, normalization: _Normalization) -> Array:
    """Return what the backward takes for x: behind a normalization in place z, for which y is given."""
    slope = normalization.slope
    if not normalization.in_place or slope is None:
        return x
    y = x.astype(normalization.shift.dtype)
    return np.where(y > 0, y, y * (1 / slope))


def _update(running: Running, mean: Array, unbiased_var: Array) -> list[Callable[[], object]]:
    """Return what writes the new running statistics, complete before the first is written."""
    tracked, momentum = running.num_batches_tracked, running.momentum
    writes: list[Callable[[], object]] = []
    if tracked is not None:
        batches = int(tracked) + 1
        writes.append(partial(tracked.__setitem__, ..., batches))
    if momentum is None:
        assert tracked is not None  # so says `prepare`
        momentum = 1 / batches
    for buffer, value in ((running.mean, mean), (running.var, unbiased_var)):
        if momentum != 1:  # 0 * inf would keep an infinity for ever
            value = (1 - momentum) * buffer.astype(np.float64) + momentum * value
        writes.append(partial(buffer.__setitem__, ..., _rounded(value, buffer.dtype)))
    return writes


def _room(target: Array, dtype: np.dtype[Any]) -> Array:
    """Return where to compute in A what `_store` then rounds to T: in the target, if it is of A."""
    return target if target.dtype == dtype else np.empty(target.shape, dtype)


def _store(target: Array, values: Array) -> None:
    if values is not target:
        target[...] = values


def _apply(x: Array, y: Array, residual: Array | None, normalization: _Normalization) -> None:
    """Write y, and record what the activation blocks."""
    slope = normalization.slope
    values = _room(y, normalization.shift.dtype)
    np.subtract(x, _column(normalization.shift), out=values)
    values *= _column(normalization.scale)
    values += _column(normalization.offset)
    if residual is not None:
        values += residual
    if slope is not None:
        blocked = values <= 0 if slope == 0 else ~(values > 0)  # as torch: NaN passes ReLU, and no leaky one
        _multiply_by_slope(values, blocked, slope)
        normalization.blocked = np.packbits(blocked)
    _store(y, values)


def _multiply_by_slope(values: Array, blocked: Array, slope: Any) -> None:
    if slope == 0:
        np.copyto(values, 0, where=blocked)  # 0 * inf would be NaN
    else:
        np.multiply(values, slope, out=values, where=blocked)


def reduce_gradients(
    dy: Array, x: Array, normalization: _Normalization, dresidual: Array | None, trailer: tuple[float, ...]
) -> Reduced:
    """Reduce `dy` and `x` to the vector of the backward, and write dresidual.

    Both are of the gradient behind the activation, which is returned for `input_gradient` too.
    """
    shift, slope = normalization.shift, normalization.slope
    x, blocked = _input(x, normalization), normalization.blocked
    g = dy.astype(shift.dtype, copy=slope is not None)
    if slope is not None:
        bits = ~(x > 0) if blocked is None else np.unpackbits(blocked, count=g.size).view(bool)
        _multiply_by_slope(g, bits.reshape(g.shape), slope)
    if dresidual is not None:
        dresidual[...] = g
    sum_dy = _sum(g)
    sum_dy_xmu = _sum_product(g, x - _column(shift)) - sum_dy * normalization.distance
    result = np.concatenate([sum_dy, sum_dy_xmu, trailer])
    return Reduced(result, result.copy(), g)


def input_gradient(
    gradient: Array,
    x: Array,
    normalization: _Normalization,
    dx: Array,
    sums: Array | None,
    parameters: ParameterSums,
    mailbox: int,
) -> tuple[Array | None, Array | None]:
    """Write dx, and return the gradients of weight and bias.

    ``dx = (g - sum_dy/count - (x - mean) * invstd² * sum_dy_xmu/count) * invstd * weight``, evaluated as
    ``(g + ((x - shift) * factor + constant)) * scale``. Without `sums` it is ``g * scale``, whatever x is.
    """
    C = x.shape[1]
    invstd, shift, count = normalization.invstd, normalization.shift, normalization.count
    dtype = shift.dtype
    values = np.empty(dx.shape, dtype) if np.may_share_memory(dx, gradient) else _room(dx, dtype)
    if sums is not None:
        sum_dy, sum_dy_xmu = sums[: 2 * C].reshape(2, C)
        factor = invstd * invstd * sum_dy_xmu / -count
        constant = sum_dy / -count - normalization.distance * factor
        np.subtract(_input(x, normalization), _column(shift), out=values)
        values *= _column(factor.astype(dtype))
        values += _column(constant.astype(dtype))
        values += gradient
        gradient = values
    np.multiply(gradient, _column(normalization.scale), out=values)
    _store(dx, values)

    vector, parameter_scale, weight_type, bias_type = parameters
    sum_dy, sum_dy_xmu = vector[: 2 * C].reshape(2, C)
    return (
        None if weight_type is None else _rounded(sum_dy_xmu * invstd * parameter_scale, weight_type),
        None if bias_type is None else _rounded(sum_dy * parameter_scale, bias_type),
    )
