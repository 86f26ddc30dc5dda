"""Batch normalization in NumPy: the operations of `backends.Backend` on a CPU.

16-bit data is loaded to float32, computed there, and rounded once when stored. float64 stays float64.
Vectors of the length of the channels are float64. `numpy_boxes` says how tensors are walked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.backends.cpu.memory import output, scratch
from cupy_syncbn.backends.cpu.numpy_boxes import Block, Sums, Tensor, row_of
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums, Reduced, Running
from cupy_syncbn.backends.vector import moments, round_to_12_bits

empty = output

NEAR = 1.0
"""Zero counts as within the data where mean² <= NEAR * var: E[x²] - mean² then costs a bit at most."""


def overlaps(a: Array, b: Array) -> bool:
    """Tell whether two arrays share memory."""
    return np.shares_memory(a, b)


def as_kernel_input(x: Array) -> Array:
    """Return `x`: strides do not matter here."""
    return x


def check_device(x: Array) -> None:
    """Check nothing: there is one device."""


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Type that data of `dtype` is computed in: float64 for itself, float32 for the rest."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


class _Local(NamedTuple):
    """Statistics of one rank: Σ(x - shift) and Σ(x - shift)², (C,) in float64."""

    n: int
    """Values a channel."""
    shift: Array | None
    """None for zero."""
    sum: Array
    square: Array


def statistics(x: Array, trailer: tuple[float, ...]) -> tuple[Array, _Local]:
    """Reduce `x` to the vector of the forward, in one pass where zero lies within the data.

    Elsewhere Σx² is of no use in the precision of the data, as Σx² - (Σx)²/count would cancel. A second
    pass then takes the differences from the mean, which are exact between values close to each other.
    """
    N, C, S = x.shape
    dtype = accumulator(x.dtype)
    local = _Local(N * S, None, np.zeros(C), np.zeros(C))
    if x.size:
        tensor = Tensor("x", x, dtype)
        for block in tensor.blocks():
            sums = Sums(x.shape, block, dtype)
            for box in block.boxes:
                values = tensor.read(box)
                sums.add(box, values, values)
            local.sum[block.channels], local.square[block.channels] = sums.total()
        outside = local.sum * local.sum > (N * S * NEAR / (NEAR + 1)) * local.square
        if outside.any():
            shift = np.where(outside & np.isfinite(local.sum), local.sum / (N * S), 0).astype(dtype)
            local = local._replace(shift=shift.astype(np.float64))
            for block in tensor.blocks(workspace=True):
                if shift[block.channels].any():
                    local.sum[block.channels], local.square[block.channels] = _shifted(tensor, block, shift)
        if dtype == np.float32 and not math.isfinite(np.add.reduce(local.square)):
            local = _redo_overflown(x, local)
    return _vector_about_pivot(local, trailer), local


def _shifted(tensor: Tensor, block: Block, shift: Array) -> tuple[Array, Array]:
    """Return Σ(x - shift) and Σ(x - shift)² of the channels of a block."""
    row = row_of("shift", shift[block.channels], block)
    sums = Sums(tensor.array.shape, block, tensor.dtype)
    for box in block.boxes:
        values = tensor.read(box)
        difference = scratch("difference", values.shape, tensor.dtype)
        box.apply(np.subtract, values, row, difference)
        sums.add(box, difference, difference)
    return sums.total()


def _redo_overflown(x: Array, local: _Local) -> _Local:
    """Compute channels in float64 whose squares, unlike their values, exceed the range of float32."""
    n, shift, sum_, square = local
    shift = np.zeros(x.shape[1]) if shift is None else shift
    for channel in np.flatnonzero(~np.isfinite(square)):
        values = x[:, channel].astype(np.float64)
        if np.isfinite(values).all():
            shift[channel] = values.mean()
            values -= shift[channel]
            sum_[channel], square[channel] = values.sum(), np.vdot(values, values)
    return _Local(n, shift, sum_, square)


def _vector_about_pivot(local: _Local, trailer: tuple[float, ...]) -> Array:
    """Return the vector of the forward, about the shift rounded to a pivot."""
    n, shift, sum_, square = local
    C = sum_.size
    result = np.zeros(4 * C + 1 + len(trailer))
    result[4 * C :] = n, *trailer
    rows = result[: 4 * C].reshape(4, C)
    rows[2] = sum_
    rows[3] = square
    if shift is not None:
        pivot = round_to_12_bits(shift)
        rest = shift - pivot
        rows[0] = n * pivot
        rows[1] = n * pivot * pivot
        rows[2] += n * rest
        rows[3] += rest * (2 * sum_ + n * rest) + 2 * pivot * rows[2]
    return result


def centered_squares(local: _Local, vector: Array, trailer: tuple[float, ...]) -> Array:
    """Return the vector [Σ(x - mean)² (C) | trailer] about the mean over all ranks, for float64 data."""
    mean, _, _ = moments(vector, local.sum.size)
    distance = mean if local.shift is None else mean - local.shift
    square = local.square - distance * (2 * local.sum - local.n * distance)
    return np.concatenate([square, trailer])


@dataclass(slots=True)
class _Normalization:
    """The step of a forward at each element: ``activation((x - shift) * scale + offset + residual)``.

    The shift is the mean where zero lies outside the data, rounded to the type that x is computed in: there
    ``x * scale`` and the offset would both exceed their sum by mean/std. Elsewhere it is 0, or None for all.
    """

    mean: Array
    """(C,) in float64, as are `invstd` and `distance`."""
    invstd: Array
    distance: Array
    """mean - shift."""
    shift: Array | None
    """(C,) in the type that x is computed in, as are `scale` and `offset`."""
    scale: Array
    offset: Array
    slope: float | None
    """Slope of the activation below zero; None for no activation."""
    count: float
    """Values a channel over all ranks."""
    passed: list[Array] = field(default_factory=list)
    """For each box, last first, a bit for each element: whether the activation lets its gradient pass."""


def _normalization(
    mean: Array, var: Array, count: float, affine: Affine, slope: float | None, dtype: np.dtype[Any]
) -> _Normalization:
    weight, bias, eps = affine
    invstd = 1 / np.sqrt(var + eps)
    scale = invstd if weight is None else invstd * weight
    outside = mean * mean > NEAR * var
    shift, distance = None, mean
    if np.logical_or.reduce(outside):
        shift = np.where(outside, mean, 0).astype(dtype)
        distance = mean - shift
    offset = distance * scale
    offset = -offset if bias is None else bias - offset
    return _Normalization(
        mean, invstd, distance, shift, scale.astype(dtype), offset.astype(dtype), slope, count
    )


def normalize(
    x: Array, y: Array, batch: BatchSums | None, running: Running | None, affine: Affine, epilogue: Epilogue
) -> tuple[_Normalization, list[Callable[[], object]]]:
    """Write y by the statistics of the batch, or without one by the running ones."""
    count = 0.0
    if batch is not None:
        C = x.shape[1]
        mean, m2, count = moments(batch.vector, C)
        var = np.maximum(m2 if batch.squares is None else batch.squares[:C], 0) / max(count, 1)
    else:
        assert running is not None  # so says `prepare`
        mean, var = running.mean.astype(np.float64), running.var.astype(np.float64)
    normalization = _normalization(mean, var, count, affine, epilogue.slope, accumulator(x.dtype))
    _apply(x, y, epilogue.residual, normalization)
    if batch is None or running is None or not count:
        return normalization, []
    return normalization, _update(running, mean, var * (count / max(count - 1, 1)))


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
            value = np.multiply(momentum, value)
            value += np.multiply(buffer, 1 - momentum, dtype=np.float64)
        writes.append(partial(buffer.__setitem__, ..., value.astype(buffer.dtype)))
    return writes


def _apply(x: Array, y: Array, residual: Array | None, normalization: _Normalization) -> None:
    """Write y, last box first: a cache still holds the last ones from the pass that made the statistics."""
    if x.size == 0:
        return
    dtype, slope = normalization.scale.dtype, normalization.slope
    source, target = Tensor("x", x, dtype), Tensor("x", y, dtype)  # in place, if by copies
    added = None if residual is None else Tensor("residual", residual, dtype)
    for block in reversed(source.blocks()):
        shift = normalization.shift
        if shift is not None:
            shift = row_of("shift", shift[block.channels], block)
        scale = row_of("scale", normalization.scale[block.channels], block)
        offset = row_of("offset", normalization.offset[block.channels], block)
        for box in reversed(block.boxes):
            values, out = source.read(box), target.place(box)
            if shift is not None:
                values = box.apply(np.subtract, values, shift, out)
            box.apply(np.multiply, values, scale, out)
            box.apply(np.add, out, offset, out)
            if added is not None:
                np.add(out, added.read(box), out=out)
            if slope is not None:
                # A row of zeros, since np.maximum takes half as long again with a scalar.
                below = _zeros(out.shape[-1], dtype)
                if slope:
                    below = np.multiply(out, slope, out=scratch("difference", out.shape, dtype))
                np.maximum(out, below, out=out)
                above = np.greater if slope else np.not_equal  # as torch: NaN passes ReLU, and no leaky one
                passed = above(out, 0, out=scratch("passed", out.shape, np.dtype(bool)))
                normalization.passed.append(np.packbits(passed))
            target.placed(box, out)


@functools.lru_cache(maxsize=16)
def _zeros(length: int, dtype: np.dtype[Any]) -> Array:
    return np.zeros(length, dtype)


def _through_activation(dy: Array, passed: Array, slope: float, out: Array | None = None) -> Array:
    """Compute ``dy * (1 where passed, else slope)``, by default in the scratch "gradient"."""
    bits = np.unpackbits(passed, count=dy.size).view(np.int8).reshape(dy.shape)
    factor = scratch("gradient", dy.shape, dy.dtype)  # out may be in no cache: it is written once
    out = factor if out is None else out
    if slope == 0:  # by masks of bits: 0 * dy would be NaN where dy is infinite
        integer = np.dtype(f"i{dy.dtype.itemsize}")
        np.copyto(factor.view(integer), np.negative(bits, out=bits))
        np.bitwise_and(dy.view(integer), factor.view(integer), out=out.view(integer))
    else:
        np.copyto(factor, bits)
        np.multiply(dy, np.maximum(factor, slope, out=factor), out=out)
    return out


class _Gradient(NamedTuple):
    """The gradient behind the activation, or the one before it where that cannot be kept exactly."""

    array: Array
    pending: bool
    """Whether the activation's derivative is still to be applied."""


def reduce_gradients(
    dy: Array, x: Array, normalization: _Normalization, dresidual: Array | None, trailer: tuple[float, ...]
) -> Reduced:
    """Reduce `dy` and `x` to the vector of the backward, in one pass that also writes dresidual."""
    C = x.shape[1]
    result = np.zeros(2 * C + len(trailer))
    result[2 * C :] = trailer
    dtype, slope = normalization.scale.dtype, normalization.slope
    # 16 bits would round a product with the slope of leaky ReLU.
    exact = dresidual is not None and (not slope or x.dtype == dtype)
    handle = (
        _Gradient(dresidual, False) if exact and dresidual is not None else _Gradient(dy, slope is not None)
    )
    if x.size == 0:
        return Reduced(result, result.copy(), handle)
    source, gradient = Tensor("x", x, dtype), Tensor("dy", dy, dtype)
    target = None if dresidual is None else Tensor("dresidual", dresidual, dtype)
    passed = reversed(normalization.passed)
    for block in source.blocks():
        shift = normalization.shift
        if shift is not None:
            shift = row_of("shift", shift[block.channels], block)
        sums = Sums(x.shape, block, dtype)
        for box in block.boxes:
            values, g = source.read(box), gradient.read(box)
            if slope is not None:
                out = None if target is None else target.place(box)
                g = _through_activation(g, next(passed), slope, out)
                if target is not None:
                    target.placed(box, g)
            elif target is not None:
                target.write(box, g)
            if shift is not None:
                values = box.apply(np.subtract, values, shift, scratch("difference", values.shape, dtype))
            sums.add(box, g, values)
        sum_dy, sum_dy_xmu = result[: 2 * C].reshape(2, C)
        sum_dy[block.channels], sum_dy_xmu[block.channels] = sums.total()
    sum_dy_xmu -= sum_dy * normalization.distance
    return Reduced(result, result.copy(), handle)


def input_gradient(
    gradient: _Gradient,
    x: Array,
    normalization: _Normalization,
    dx: Array,
    sums: Array | None,
    parameters: ParameterSums,
) -> tuple[Array | None, Array | None]:
    """Write dx, and return the gradients of weight and bias."""
    if x.size:
        _write_input_gradient(gradient, x, normalization, sums, dx)
    vector, scale, weight_type, bias_type = parameters
    sum_dy, sum_dy_xmu = vector[: 2 * x.shape[1]].reshape(2, -1) * scale
    dweight, dbias = sum_dy_xmu * normalization.invstd, sum_dy
    return (
        None if weight_type is None else dweight.astype(weight_type),
        None if bias_type is None else dbias.astype(bias_type),
    )


def _write_input_gradient(
    gradient: _Gradient, x: Array, normalization: _Normalization, vector: Array | None, dx: Array
) -> None:
    """Write dx, last box first.

    ``dx = (g - sum_dy/count - (x - mean) * invstd² * sum_dy_xmu/count) * invstd * weight``, evaluated as
    ``((x - shift) * factor + g + constant) * scale``. `vector` is None where the statistics were constants:
    ``dx = g * scale``.
    """
    dtype = normalization.scale.dtype
    if vector is not None:
        sum_dy, sum_dy_xmu = vector[: 2 * x.shape[1]].reshape(2, -1)
        exact = normalization.invstd**2 * sum_dy_xmu / -normalization.count
        constant = (sum_dy / -normalization.count - normalization.distance * exact).astype(dtype)
        factor = exact.astype(dtype)
    source, target = Tensor("x", x, dtype), Tensor("x", dx, dtype)  # in place, if by copies
    behind = Tensor("dy", gradient.array, dtype)
    passed = iter(normalization.passed)
    for block in reversed(source.blocks()):
        shift = normalization.shift
        if shift is not None:
            shift = row_of("shift", shift[block.channels], block)
        scale = row_of("scale", normalization.scale[block.channels], block)
        if vector is not None:
            factors = row_of("factor", factor[block.channels], block)
            constants = row_of("constant", constant[block.channels], block)
        for box in reversed(block.boxes):
            out, g = target.place(box), behind.read(box)
            if gradient.pending:
                assert normalization.slope is not None
                g = _through_activation(g, next(passed), normalization.slope)
            if vector is not None:
                values = source.read(box)
                if shift is not None:
                    values = box.apply(np.subtract, values, shift, out)
                box.apply(np.multiply, values, factors, out)
                np.add(out, g, out=out)
                g = box.apply(np.add, out, constants, out)
            target.placed(box, box.apply(np.multiply, g, scale, out))
