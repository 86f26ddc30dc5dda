"""Batch normalization in NumPy: the operations of `backends.Backend` on a CPU.

A tensor is walked in boxes that stay in a core's L2 cache while a handful of NumPy calls work on them, so
main memory is read and written as often as the algorithm demands and no more. Three facts shape the code:

* A NumPy ufunc copies a broadcast operand through its buffer wherever the inner dimension is shorter than
  that buffer (8192 elements), which costs more than the arithmetic. So per-channel operands are written
  out once to rows at least that long, and a tensor is viewed as such rows.
* A matrix-vector product with ones is NumPy's fastest sum; `numpy.vecdot` is its fastest sum of products
  of long rows. Both leave partial sums of a few hundred to a few thousand values, which are added in float64.
* Masked copies and `numpy.where` branch at each element. Masks of bits do not.

16-bit data is loaded to float32, computed there, and rounded once when stored. float64 stays float64.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.backends import Normalization, Running
from cupy_syncbn.backends.layout import Array, Layout

BOX_BYTES = 1 << 18
"""Bytes of a box: a quarter MiB, so that a pass over three tensors works within 1 MiB of L2 cache."""
ROW = 8192
"""Elements of NumPy's ufunc buffer: the shortest row to which it applies an operand without a copy."""
COLUMNS = 512
"""Least width of the matrices whose columns are added up: their height, the length of a chain, is small."""
SHORT = 16
"""Rows of fewer elements are added up across rows, by columns, instead of within."""
LONG = 128
"""From this length on `numpy.vecdot` repays the overhead of a call of BLAS for each row."""
PARTIAL = 4096
"""The longest row that is added up in the precision of the data."""
NEAR = 4.0
"""Zero counts as within the data where mean² <= NEAR * var: E[x²] - mean² then costs two bits at most."""


class _Scratch(threading.local):
    """Named buffers that each thread allocates once and uses again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}
        self._views: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        view = self._views.get(name)
        if view is None or view.shape != shape or view.dtype != dtype:
            nbytes = math.prod(shape) * dtype.itemsize
            buffer = self._buffers.get(name)
            if buffer is None or buffer.nbytes < nbytes:
                buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
            view = self._views[name] = buffer[:nbytes].view(dtype).reshape(shape)
        return view


_scratch = _Scratch()


class _Box(NamedTuple):
    """A part of a tensor that one round of NumPy calls works on."""

    where: tuple[slice, slice, slice]
    shape: tuple[int, int, int]
    rows: tuple[int, int]
    """Its shape for elementwise operations: rows of the length of the block's operands."""
    columns: tuple[int, int]
    """Its shape for sums by columns: each row is a whole number of (C, S) samples."""

    @property
    def per_channel(self) -> int:
        """How many values a channel has in it."""
        return self.shape[0] * self.shape[2]


class _Block(NamedTuple):
    """The boxes of some channels, and how per-channel operands are written out for them."""

    channels: slice
    operand: tuple[int, int, int] | None
    """Shape (samples, C, S) that a (C,) vector is broadcast to; None where S is a row by itself."""
    boxes: tuple[_Box, ...]


@functools.lru_cache(maxsize=256)
def _blocks(shape: tuple[int, int, int], itemsize: int) -> tuple[_Block, ...]:
    """Divide a tensor into blocks of channels, and these into boxes of at most BOX_BYTES.

    Rows of operands are between ROW and a box long: several samples where C*S is short of ROW, several
    channels of one sample where S is, and a part of one channel where S exceeds a box.
    """
    N, C, S = shape
    size = BOX_BYTES // itemsize
    everything = slice(0, C), slice(0, S)
    if C * S < ROW:
        few = _ceil(COLUMNS, C * S)  # samples in a row of a column sum
        fold = few * _ceil(ROW, few * C * S)  # samples in a row of an elementwise operation
        boxes = []
        start = 0
        # As many samples as fill rows, then as many as fill columns, then the rest.
        for unit, most in ((fold, max(fold, size // (C * S) // fold * fold)), (few, fold), (1, few)):
            while N - start >= unit:
                n = min(most, (N - start) // unit * unit)
                width = min(unit, few) * C * S
                rows = (n // fold, fold * C * S) if unit == fold else (1, n * C * S)
                index = (slice(start, start + n), *everything)
                boxes.append(_Box(index, (n, C, S), rows, (n * C * S // width, width)))
                start += n
        return (_Block(everything[0], (min(fold, N), C, S), tuple(boxes)),)
    blocks = []
    if S < ROW:
        for channels in _split(C, C * S // ROW):
            c = channels.stop - channels.start
            boxes = []
            for samples in _split(N, _ceil(N * c * S, size)):
                n = samples.stop - samples.start
                boxes.append(_Box((samples, channels, everything[1]), (n, c, S), (n, c * S), (n, c * S)))
            blocks.append(_Block(channels, (1, c, S), tuple(boxes)))
        return tuple(blocks)
    pieces = _split(S, _ceil(S, size))
    for channels in _split(C, _ceil(C * S, max(size, S))):
        c = channels.stop - channels.start
        boxes = []
        for n in range(N):
            for positions in pieces:
                s = positions.stop - positions.start
                boxes.append(_Box((slice(n, n + 1), channels, positions), (1, c, s), (c, s), (1, c * s)))
        blocks.append(_Block(channels, None, tuple(boxes)))
    return tuple(blocks)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _split(length: int, parts: int) -> list[slice]:
    """Split range(length) into at most `parts` slices that differ by one at most."""
    parts = max(1, min(parts, length))
    return [slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


class _Tensor:
    """A tensor seen box by box in the accumulator's type: in place where memory allows, else by copies."""

    def __init__(self, name: str, array: Array, dtype: np.dtype[Any]) -> None:
        self.name, self.array, self.dtype = name, array, dtype
        N, C, S = array.shape
        steps = array.strides
        self.direct = (
            array.dtype == dtype
            and array.flags.aligned
            and (S == 1 or steps[2] == dtype.itemsize)
            and (C == 1 or steps[1] == S * dtype.itemsize)
            # Samples share rows where C*S is short of ROW, so they must be adjacent.
            and (N == 1 or C * S >= ROW or steps[0] == C * S * dtype.itemsize)
        )

    def read(self, box: _Box) -> Array:
        """Return the box's values, to be left unchanged."""
        part: Array = self.array[box.where]
        if self.direct:
            return part.reshape(box.rows)
        held = _scratch(self.name, box.shape, self.dtype)
        np.copyto(held, part)
        return held.reshape(box.rows)

    def place(self, box: _Box) -> Array:
        """Return where to compute the box's new values, for `placed` to store."""
        if self.direct:
            return self.array[box.where].reshape(box.rows)
        return _scratch(self.name, box.shape, self.dtype).reshape(box.rows)

    def placed(self, box: _Box, values: Array) -> None:
        """Store what was computed in `place`."""
        if not self.direct:
            self.write(box, values)

    def write(self, box: _Box, values: Array) -> None:
        """Store what was computed elsewhere, rounded to the tensor's type."""
        np.copyto(self.array[box.where], values.reshape(box.shape), casting="unsafe")


def empty(layout: Layout, dtype: Any) -> Array:
    """Allocate a tensor."""
    return layout.empty(np, dtype)


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


def _channel_sums(values: Array, box: _Box) -> Array:
    """Σ values per channel, (C,) in float64."""
    _, c, s = box.shape
    if s < SHORT:
        matrix = values.reshape(box.columns)
        by_column: Array = _ones(box.columns[0], values.dtype) @ matrix
        return _add_up(by_column.reshape(-1, c, s))
    return _add_up(*(piece @ _ones(piece.shape[-1], values.dtype) for piece in _pieces(values, box)))


def _channel_products(a: Array, b: Array, box: _Box) -> Array:
    """Σ a*b per channel, (C,) in float64."""
    if box.shape[2] < LONG:
        product = _scratch("product", a.shape, a.dtype)
        return _channel_sums(np.multiply(a, b, out=product), box)
    pairs = zip(_pieces(a, box), _pieces(b, box), strict=True)
    return _add_up(*(np.vecdot(left, right) for left, right in pairs))


def _add_up(first: Array, *more: Array) -> Array:
    """Add up partial sums (n, C, k) over n and k, in float64."""
    total: Array = first.sum(axis=(0, 2), dtype=np.float64)
    for partial in more:
        total += partial.sum(axis=(0, 2), dtype=np.float64)
    return total


def _pieces(values: Array, box: _Box) -> list[Array]:
    """Split (n, C, S) into (n, C, k, PARTIAL) and what remains, (n, C, 1, rest)."""
    n, c, s = box.shape
    tensor = values.reshape(box.shape)
    whole = s - s % PARTIAL
    pieces = []
    if whole:
        pieces.append(tensor[:, :, :whole].reshape(n, c, -1, PARTIAL))
    if whole < s:
        pieces.append(tensor[:, :, None, whole:])
    return pieces


@functools.lru_cache(maxsize=64)
def _ones(length: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(length, dtype)


def _row(name: str, values: Array, block: _Block) -> Array:
    """Write out the block's part (c,) of a vector to a row; it applies to ``box.rows`` as ``row[:width]``."""
    column: Array = values[:, None]
    if block.operand is None:
        return column
    row = _scratch(name, block.operand, values.dtype)
    np.copyto(row, column)
    return row.reshape(-1)


def _operand(name: str, values: Array | None, block: _Block) -> Array | None:
    return None if values is None else _row(name, values[block.channels], block)


@np.errstate(all="ignore")  # inf and NaN in the data are the data's; overflow is looked for below
def statistics(x: Array, trailer: tuple[float, ...]) -> Array:
    """Reduce `x` to the exchange vector of the forward, in one pass.

    Each box yields Σ(x - shift) and Σ(x - shift)² in the precision of the data. The shift is zero where
    zero lies within the box's data, else the mean of the box, which is then read again from cache: the
    differences of values close to each other are exact. Boxes are added up in float64, about the pivot.
    """
    N, C, S = x.shape
    result = vector(4, C, (N * S, *trailer))
    if N * S == 0:
        return result
    pivot_sum, pivot_square, sum_, square = result[: 4 * C].reshape(4, C)
    dtype = accumulator(x.dtype)
    tensor = _Tensor("x", x, dtype)
    for block in _blocks(x.shape, dtype.itemsize):
        pivot = None
        channels = block.channels
        for number, box in enumerate(block.boxes):
            values = tensor.read(box)
            s1 = _channel_sums(values, box)
            s2 = _channel_products(values, values, box)
            outside = (1 + 1 / NEAR) * s1 * s1 > box.per_channel * s2
            offset = pivot
            if outside.any():
                shift = np.where(outside, s1 / box.per_channel, 0).astype(dtype)
                row = _row("shift", shift, block)
                difference = _scratch("difference", values.shape, dtype)
                np.subtract(values, row[: values.shape[-1]], out=difference)
                s1 = _channel_sums(difference, box)
                s2 = _channel_products(difference, difference, box)
                if number == 0:
                    pivot = _round_to_12_bits(shift.astype(np.float64))
                offset = (0 if pivot is None else pivot) - shift.astype(np.float64)
            if offset is not None:  # (x - shift) is taken to (x - pivot)
                s2 += offset * (box.per_channel * offset - 2 * s1)
                s1 -= box.per_channel * offset
            sum_[channels] += s1
            square[channels] += s2
        if pivot is not None:
            pivot_sum[channels] = N * S * pivot
            pivot_square[channels] = N * S * pivot * pivot
            square[channels] += 2 * pivot * sum_[channels]
    if dtype == np.float32 and not np.isfinite(square).all():
        _redo_overflown(x, result[: 4 * C].reshape(4, C))
    return result


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


def _float64(values: Array | None) -> Array | None:
    return None if values is None else values.astype(np.float64)


@np.errstate(all="ignore")
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
) -> Normalization:
    """Write y by the statistics in the exchanged `vector`, and update the running statistics."""
    mean, var, count = _moments(vector, x.shape[1])
    normalization = _normalization(mean, var, weight, bias, eps, slope, count)
    _apply(x, y, residual, normalization)
    if running is not None and count > 0:
        _update(running, mean, var * (count / max(count - 1, 1)))
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


@np.errstate(all="ignore")
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
) -> Normalization:
    """Write y by given statistics."""
    mean, var = mean.astype(np.float64), var.astype(np.float64)
    normalization = _normalization(mean, var, weight, bias, eps, slope, 0.0)
    _apply(x, y, residual, normalization)
    return normalization


def _normalization(
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    slope: float | None,
    count: float,
) -> Normalization:
    invstd = 1 / np.sqrt(var + eps)
    return Normalization(mean, var, invstd, _float64(weight), _float64(bias), slope, count)


def _shift(normalization: Normalization) -> Array | None:
    """Return what to subtract from x before scaling: the mean, or nothing where zero is within the data.

    A mean far from zero must be subtracted first: in ``x * scale + offset`` both terms would be larger
    than their sum by mean/std.
    """
    mean = normalization.mean
    outside = mean * mean > NEAR * normalization.var
    return np.where(outside, mean, 0) if outside.any() else None


class _Affine(NamedTuple):
    """y = (x - shift) * scale + offset, each (C,) or, written out for a block, a row."""

    shift: Array | None
    scale: Array
    offset: Array

    @classmethod
    def of(cls, normalization: Normalization, dtype: np.dtype[Any]) -> _Affine:
        mean, weight, bias = normalization.mean, normalization.weight, normalization.bias
        shift = _shift(normalization)
        scale = normalization.invstd if weight is None else normalization.invstd * weight
        if shift is None:
            offset = -mean * scale
        else:
            shift = shift.astype(dtype)
            offset = (shift - mean) * scale
        if bias is not None:
            offset += bias
        return cls(shift, scale.astype(dtype), offset.astype(dtype))

    def written_out(self, block: _Block) -> _Affine:
        """Return the operands for a block."""
        channels = block.channels
        return _Affine(
            _operand("shift", self.shift, block),
            _row("scale", self.scale[channels], block),
            _row("offset", self.offset[channels], block),
        )

    def __call__(self, x: Array, residual: Array | None, out: Array) -> Array:
        """Compute the input of the activation; forward and backward get the same bits."""
        width = x.shape[-1]
        if self.shift is not None:
            x = np.subtract(x, self.shift[:width], out=out)
        np.multiply(x, self.scale[:width], out=out)
        np.add(out, self.offset[:width], out=out)
        if residual is not None:
            np.add(out, residual, out=out)
        return out


def _apply(x: Array, y: Array, residual: Array | None, normalization: Normalization) -> None:
    """Write ``y = activation((x - mean) * invstd * weight + bias + residual)``, last box first.

    The last boxes are what a cache still holds of the pass that made the statistics.
    """
    if x.size == 0:
        return
    dtype = accumulator(x.dtype)
    slope = normalization.slope
    affine = _Affine.of(normalization, dtype)
    source, target = _Tensor("x", x, dtype), _Tensor("y", y, dtype)
    added = None if residual is None else _Tensor("residual", residual, dtype)
    for block in reversed(_blocks(x.shape, dtype.itemsize)):
        operands = affine.written_out(block)
        for box in reversed(block.boxes):
            values = target.place(box)
            operands(source.read(box), None if added is None else added.read(box), values)
            if slope == 0:
                np.maximum(values, 0, out=values)
            elif slope is not None:
                below = _scratch("difference", values.shape, dtype)
                np.maximum(values, np.multiply(values, slope, out=below), out=values)
            target.placed(box, values)


class _OutputGradient:
    """The gradient of the activation's input, box by box: dy, through the activation's derivative."""

    def __init__(self, dy: Array, x: Array, residual: Array | None, normalization: Normalization) -> None:
        self.dtype = accumulator(x.dtype)
        self.slope = normalization.slope
        self.dy, self.x = _Tensor("dy", dy, self.dtype), _Tensor("x", x, self.dtype)
        self.residual = None if residual is None else _Tensor("residual", residual, self.dtype)
        self.affine = _Affine.of(normalization, self.dtype)

    def begin(self, block: _Block) -> None:
        """Prepare the operands of a block."""
        if self.slope is not None:
            self.operands = self.affine.written_out(block)

    def read(self, box: _Box, x: Array) -> Array:
        """Return the gradient; `x` is the box of x."""
        dy = self.dy.read(box)
        if self.slope is None:
            return dy
        z = _scratch("z", dy.shape, self.dtype)
        self.operands(x, None if self.residual is None else self.residual.read(box), z)
        blocked = np.less_equal(z, 0, out=_scratch("blocked", dy.shape, np.dtype(bool)))
        if self.slope == 0:  # by bits, so that an infinite dy is masked too
            bits = np.dtype(f"i{self.dtype.itemsize}")
            keep = z.view(bits)
            np.copyto(keep, np.subtract(blocked.view(np.int8), 1, out=blocked.view(np.int8)))
            np.bitwise_and(dy.view(bits), keep, out=keep)
        else:
            np.copyto(z, np.logical_not(blocked, out=blocked))
            np.multiply(dy, np.maximum(z, self.slope, out=z), out=z)
        return z


@np.errstate(all="ignore")
def reduce_gradients(
    dy: Array,
    x: Array,
    residual: Array | None,
    normalization: Normalization,
    trailer: tuple[float, ...],
) -> Array:
    """Reduce `dy` and `x` to the exchange vector of the backward, in one pass."""
    C = x.shape[1]
    result = vector(2, C, trailer)
    if x.size == 0:
        return result
    sum_dy, sum_dy_xmu = result[: 2 * C].reshape(2, C)
    gradient = _OutputGradient(dy, x, residual, normalization)
    shift = gradient.affine.shift
    for block in _blocks(x.shape, gradient.dtype.itemsize):
        gradient.begin(block)
        row = _operand("shift", shift, block)
        for box in block.boxes:
            values = gradient.x.read(box)
            g = gradient.read(box, values)
            if row is not None:
                difference = _scratch("difference", values.shape, gradient.dtype)
                values = np.subtract(values, row[: values.shape[-1]], out=difference)
            sum_dy[block.channels] += _channel_sums(g, box)
            sum_dy_xmu[block.channels] += _channel_products(g, values, box)
    # What was subtracted is the mean as the data's type holds it, or zero.
    sum_dy_xmu -= sum_dy * (normalization.mean if shift is None else normalization.mean - shift)
    return result


@np.errstate(all="ignore")
def parameter_gradients(
    sums: Array, normalization: Normalization, scale: float, dtype: Any
) -> tuple[Array | None, Array | None]:
    """Gradients of weight and bias from the leading ``[sum_dy | sum_dy_xmu]`` of a vector, times `scale`."""
    C = normalization.mean.size
    weight = bias = None
    if normalization.weight is not None:
        weight = (sums[C : 2 * C] * normalization.invstd * scale).astype(dtype)
    if normalization.bias is not None:
        bias = (sums[:C] * scale).astype(dtype)
    return weight, bias


@np.errstate(all="ignore")
def input_gradient(
    dy: Array,
    x: Array,
    residual: Array | None,
    normalization: Normalization,
    vector: Array | None,
    dx: Array,
    dresidual: Array | None,
) -> None:
    """Write dx and dresidual, last box first.

    ``dx = (dy - sum_dy/count - (x - mean) * invstd² * sum_dy_xmu/count) * invstd * weight``, evaluated as
    ``((x - shift) * slope + dy + offset) * scale``. `vector` is None where the statistics were constants:
    ``dx = dy * scale``.
    """
    if x.size == 0:
        return
    gradient = _OutputGradient(dy, x, residual, normalization)
    dtype, (shift, scale, _) = gradient.dtype, gradient.affine
    slope = offset = None
    if vector is not None:
        sum_dy, sum_dy_xmu = vector[: 2 * x.shape[1]].reshape(2, -1)
        exact = normalization.invstd**2 * sum_dy_xmu / -normalization.count
        distance = normalization.mean if shift is None else normalization.mean - shift
        slope = exact.astype(dtype)
        offset = (-sum_dy / normalization.count - distance * exact).astype(dtype)
    target = _Tensor("y", dx, dtype)
    dresidual_target = None if dresidual is None else _Tensor("dresidual", dresidual, dtype)
    for block in reversed(_blocks(x.shape, dtype.itemsize)):
        gradient.begin(block)
        shift_row, scale_row = _operand("shift", shift, block), _row("scale", scale[block.channels], block)
        slope_row, offset_row = _operand("slope", slope, block), _operand("constant", offset, block)
        for box in reversed(block.boxes):
            values = gradient.x.read(box)
            g = gradient.read(box, values)
            if dresidual_target is not None:
                dresidual_target.write(box, g)
            out = target.place(box)
            width = out.shape[-1]
            if slope_row is not None and offset_row is not None:
                if shift_row is not None:
                    values = np.subtract(values, shift_row[:width], out=out)
                np.multiply(values, slope_row[:width], out=out)
                np.add(out, g, out=out)
                g = np.add(out, offset_row[:width], out=out)
            target.placed(box, np.multiply(g, scale_row[:width], out=out))
