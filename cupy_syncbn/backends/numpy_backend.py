"""Batch normalization in NumPy: the operations of `backends.Backend` on a CPU.

16-bit data is loaded to float32, computed there, and rounded once when stored. float64 stays float64.
Vectors of the length of the channels are float64. `numpy_boxes` says how tensors are walked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupy_syncbn.backends.interface import Running
from cupy_syncbn.backends.layout import Array, Layout
from cupy_syncbn.backends.numpy_boxes import (
    Block,
    Box,
    Tensor,
    aligned_empty,
    blocks_of,
    channel_products,
    channel_sums,
    operand_of,
    row_of,
    scratch,
)

NEAR = 4.0
"""Zero counts as within the data where mean² <= NEAR * var: E[x²] - mean² then costs two bits at most."""


def empty(layout: Layout, dtype: Any) -> Array:
    """Allocate a batch of a layout, contiguous in its memory order."""
    dtype = np.dtype(dtype)
    size = math.prod(layout.shape)
    return layout.as_batch(aligned_empty(size * dtype.itemsize).view(dtype))


def overlaps(a: Array, b: Array) -> bool:
    """Tell whether two arrays share memory."""
    return np.shares_memory(a, b)


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Type that data of `dtype` is computed in: float64 for itself, float32 for the rest."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def vector(rows: int, channels: int, trailer: tuple[float, ...]) -> Array:
    """Return an exchange vector of zeros that ends in `trailer`."""
    result = np.zeros(rows * channels + len(trailer))
    result[rows * channels :] = trailer
    return result


def statistics(x: Array, trailer: tuple[float, ...]) -> Array:
    """Reduce `x` to the exchange vector of the forward, in one pass wherever zero lies within the data.

    Σx and Σx² are taken in the precision of the data over each box, and in float64 over the boxes. Where
    the first box of some channels, or all of them at last, show zero to lie outside the data, Σ(x - shift)
    and Σ(x - shift)² take their place, the shift being the mean of each box: differences of values close
    to each other are exact.
    """
    N, C, S = x.shape
    result = vector(4, C, (N * S, *trailer))
    if N * S == 0:
        return result
    pivot_sum, pivot_square, sum_, square = result[: 4 * C].reshape(4, C)
    dtype = accumulator(x.dtype)
    tensor = Tensor("x", x, dtype)
    for block in blocks_of(x.shape, dtype.itemsize):
        channels = block.channels
        first, *rest = block.boxes
        sums = _plain_sums(tensor, first)
        count = first.per_channel
        if rest and not _outside(*sums, count).any():
            for box in rest:
                sums = sums[0] + (more := _plain_sums(tensor, box))[0], sums[1] + more[1]
            count = N * S
        if not _outside(*sums, count).any():
            sum_[channels], square[channels] = sums
            continue
        pivot, sum_[channels], square[channels] = _shifted_sums(tensor, block)
        pivot_sum[channels] = N * S * pivot
        pivot_square[channels] = N * S * pivot * pivot
        square[channels] += 2 * pivot * sum_[channels]
    if dtype == np.float32 and not np.isfinite(square).all():
        _redo_overflown(x, result[: 4 * C].reshape(4, C))
    return result


def _outside(s1: Array, s2: Array, count: int) -> Array:
    """Tell for which channels zero lies outside the data: mean² > NEAR * var."""
    return (1 + 1 / NEAR) * s1 * s1 > count * s2


def _plain_sums(tensor: Tensor, box: Box) -> tuple[Array, Array]:
    values = tensor.read(box)
    product = scratch("difference", values.shape, values.dtype)
    return channel_sums(values, box), channel_products(values, values, box, product)


def _shifted_sums(tensor: Tensor, block: Block) -> tuple[Array, Array, Array]:
    """Return a pivot, Σ(x - pivot) and Σ(x - pivot)² for the channels of a block."""
    pivot = total = square = np.zeros(())
    for number, box in enumerate(block.boxes):
        values = tensor.read(box)
        shift = (channel_sums(values, box) / box.per_channel).astype(tensor.dtype)
        shift[~np.isfinite(shift)] = 0
        difference = scratch("difference", values.shape, tensor.dtype)
        box.apply(np.subtract, values, row_of("shift", shift, block), difference)
        s1 = channel_sums(difference, box)
        s2 = channel_products(difference, difference, box, difference)
        exact = shift.astype(np.float64)
        if number == 0:
            pivot = _round_to_12_bits(exact)
        offset = exact - pivot  # from (x - shift) to (x - pivot)
        square = square + (s2 + offset * (2 * s1 + box.per_channel * offset))
        total = total + (s1 + box.per_channel * offset)
    return pivot, total, square


def _redo_overflown(x: Array, rows: Array) -> None:
    """Compute channels in float64 whose squares, unlike their values, exceed the range of float32."""
    for channel in np.flatnonzero(~np.isfinite(rows[3])):
        values = x[:, channel].astype(np.float64)
        if np.isfinite(values).all():
            pivot = _round_to_12_bits(values.mean())
            values -= pivot
            total = values.sum()
            square = np.vdot(values, values) + 2 * pivot * total
            rows[:, channel] = values.size * pivot, values.size * pivot * pivot, total, square


def _round_to_12_bits(values: Array) -> Array:
    """Round float64 to 12 significant bits, by Veltkamp's splitting (Dekker 1971)."""
    scaled = values * (2.0**41 + 1)
    result: Array = scaled - (scaled - values)
    return result


def _moments(exchanged: Array, channels: int) -> tuple[Array, Array, float]:
    """Return mean, biased variance and count from the exchanged vector of the forward."""
    pivot_sum, pivot_square, sum_, square = exchanged[: 4 * channels].reshape(4, channels)
    count = float(exchanged[4 * channels])
    n = max(count, 1.0)
    if not pivot_sum.any():
        mean = sum_ / n
        m2 = square - sum_ * mean
    else:
        pivot = _round_to_12_bits(pivot_sum / n)
        rest = pivot_sum - n * pivot  # exact, as are the products in the line after the next
        mean = pivot + (rest + sum_) / n
        m2 = (pivot_square - pivot * pivot_sum) - pivot * rest
        m2 += square - 2 * pivot * sum_ - (rest + sum_) ** 2 / n
    return mean, np.maximum(m2 / n, 0), count


@dataclass(slots=True)
class _Normalization:
    """What a forward did to each element: ``activation((x - shift) * scale + offset + residual)``.

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
    blocked: list[Array] = field(default_factory=list)
    """For each box, last first, a bit for each element: whether the activation's input was at most 0."""


def _normalization(
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    slope: float | None,
    dtype: np.dtype[Any],
    count: float,
) -> _Normalization:
    invstd = 1 / np.sqrt(var + eps)
    scale = invstd if weight is None else invstd * weight
    outside = mean * mean > NEAR * var
    shift, distance = None, mean
    if outside.any():
        shift = np.where(outside, mean, 0).astype(dtype)
        distance = mean - shift
    offset = distance * scale
    offset = -offset if bias is None else bias - offset
    return _Normalization(
        mean, invstd, distance, shift, scale.astype(dtype), offset.astype(dtype), slope, count
    )


def normalize(
    x: Array,
    y: Array,
    vector: Array,
    weight: Array | None,
    bias: Array | None,
    running: Running | None,
    eps: float,
    residual: Array | None,
    slope: float | None,
) -> _Normalization:
    """Write y by the statistics in the exchanged `vector`, and update the running statistics."""
    mean, var, count = _moments(vector, x.shape[1])
    normalization = _normalization(mean, var, weight, bias, eps, slope, accumulator(x.dtype), count)
    _apply(x, y, residual, normalization)
    if running is not None and count > 0:
        _update(running, mean, var * (count / max(count - 1, 1)))
    return normalization


def normalize_fixed(
    x: Array,
    y: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    slope: float | None,
) -> _Normalization:
    """Write y by given statistics."""
    mean, var = mean.astype(np.float64), var.astype(np.float64)
    normalization = _normalization(mean, var, weight, bias, eps, slope, accumulator(x.dtype), 0.0)
    _apply(x, y, residual, normalization)
    return normalization


def _update(running: Running, mean: Array, unbiased_var: Array) -> None:
    tracked, momentum = running.num_batches_tracked, running.momentum
    if tracked is not None:
        tracked += 1
    if momentum is None:
        assert tracked is not None
        momentum = 1 / int(tracked)
    for buffer, batch in ((running.mean, mean), (running.var, unbiased_var)):
        if momentum == 1:  # 0 * inf would keep an infinity for ever
            buffer[...] = batch
        else:
            buffer[...] = (1 - momentum) * buffer.astype(np.float64) + momentum * batch


def _apply(x: Array, y: Array, residual: Array | None, normalization: _Normalization) -> None:
    """Write y, last box first: the last are what a cache still holds of the pass that made the statistics."""
    if x.size == 0:
        return
    dtype = accumulator(x.dtype)
    slope = normalization.slope
    source, target = Tensor("x", x, dtype), Tensor("y", y, dtype)
    added = None if residual is None else Tensor("residual", residual, dtype)
    for block in reversed(blocks_of(x.shape, dtype.itemsize)):
        shift = operand_of("shift", normalization.shift, block)
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
                blocked = np.less_equal(out, 0, out=scratch("blocked", out.shape, np.dtype(bool)))
                normalization.blocked.append(np.packbits(blocked))
                below: Array | float = 0.0
                if slope:
                    below = np.multiply(out, slope, out=scratch("difference", out.shape, dtype))
                np.maximum(out, below, out=out)
            target.placed(box, out)


def _through_activation(dy: Array, blocked: Array, slope: float) -> Array:
    """Return ``dy * (slope where blocked, else 1)``."""
    result = scratch("gradient", dy.shape, dy.dtype)
    bits = np.unpackbits(blocked, count=dy.size).view(np.int8).reshape(dy.shape)
    if slope == 0:  # by masks of bits: 0 * dy would be NaN where dy is infinite
        integer = np.dtype(f"i{dy.dtype.itemsize}")
        keep = result.view(integer)
        np.copyto(keep, np.subtract(bits, 1, out=bits))
        np.bitwise_and(dy.view(integer), keep, out=keep)
    else:
        np.copyto(result, np.subtract(1, bits, out=bits))
        np.multiply(dy, np.maximum(result, slope, out=result), out=result)
    return result


def reduce_gradients(
    dy: Array,
    x: Array,
    normalization: _Normalization,
    dx: Array,
    dresidual: Array | None,
    trailer: tuple[float, ...],
) -> tuple[Array, Array]:
    """Reduce `dy` and `x` to the exchange vector of the backward, in one pass.

    Returned with it is the gradient behind the activation, for `input_gradient`. It is written to
    dresidual, or to the memory of dx, so that the activation's derivative is evaluated once.
    """
    C = x.shape[1]
    result = vector(2, C, trailer)
    if x.size == 0:
        return result, dy
    dtype, slope = normalization.scale.dtype, normalization.slope
    behind = dresidual
    if slope is not None and behind is None:
        behind = dx
    if slope and x.dtype != dtype:  # a product that 16 bits would round
        behind = aligned_empty(x.size * dtype.itemsize).view(dtype).reshape(x.shape)
    source, gradient = Tensor("x", x, dtype), Tensor("dy", dy, dtype)
    targets = [Tensor("", array, dtype) for array in (behind, dresidual) if array is not None]
    if behind is dresidual:
        targets = targets[:1]
    blocked = reversed(normalization.blocked)
    sum_dy, sum_dy_xmu = result[: 2 * C].reshape(2, C)
    for block in blocks_of(x.shape, dtype.itemsize):
        shift = operand_of("shift", normalization.shift, block)
        for box in block.boxes:
            values, g = source.read(box), gradient.read(box)
            if slope is not None:
                g = _through_activation(g, next(blocked), slope)
            for target in targets:
                target.write(box, g)
            product = scratch("difference", values.shape, dtype)
            if shift is not None:
                values = box.apply(np.subtract, values, shift, product)
            sum_dy[block.channels] += channel_sums(g, box)
            sum_dy_xmu[block.channels] += channel_products(values, g, box, product)
    sum_dy_xmu -= sum_dy * normalization.distance
    return result, dy if behind is None else behind


def parameter_gradients(sums: Array, normalization: _Normalization) -> tuple[Array, Array]:
    """Gradients of weight and bias from the leading ``[sum_dy | sum_dy_xmu]`` of a vector."""
    sum_dy, sum_dy_xmu = sums[: 2 * normalization.mean.size].reshape(2, -1)
    return sum_dy_xmu * normalization.invstd, sum_dy


def input_gradient(
    g: Array, x: Array, normalization: _Normalization, vector: Array | None, dx: Array
) -> None:
    """Write dx, last box first; `g`, the gradient behind the activation, may be in its memory.

    ``dx = (g - sum_dy/count - (x - mean) * invstd² * sum_dy_xmu/count) * invstd * weight``, evaluated as
    ``((x - shift) * factor + g + constant) * scale``. `vector` is None where the statistics were constants:
    ``dx = g * scale``.
    """
    if x.size == 0:
        return
    dtype = normalization.scale.dtype
    factor = constant = None
    if vector is not None:
        sum_dy, sum_dy_xmu = vector[: 2 * x.shape[1]].reshape(2, -1)
        exact = normalization.invstd**2 * sum_dy_xmu / -normalization.count
        constant = (sum_dy / -normalization.count - normalization.distance * exact).astype(dtype)
        factor = exact.astype(dtype)
    source, gradient, target = Tensor("x", x, dtype), Tensor("dy", g, dtype), Tensor("y", dx, dtype)
    for block in reversed(blocks_of(x.shape, dtype.itemsize)):
        shift = operand_of("shift", normalization.shift, block)
        scale = row_of("scale", normalization.scale[block.channels], block)
        factors = operand_of("factor", factor, block)
        constants = operand_of("constant", constant, block)
        for box in reversed(block.boxes):
            out, values = target.place(box), gradient.read(box)
            if factors is not None and constants is not None:
                product = out if g is not dx else scratch("difference", out.shape, dtype)
                xs = source.read(box)
                if shift is not None:
                    xs = box.apply(np.subtract, xs, shift, product)
                box.apply(np.multiply, xs, factors, product)
                np.add(product, values, out=out)
                values = box.apply(np.add, out, constants, out)
            target.placed(box, box.apply(np.multiply, values, scale, out))
