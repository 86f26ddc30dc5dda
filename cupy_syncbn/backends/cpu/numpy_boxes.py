"""How the NumPy backend walks a tensor: boxes that stay in cache, rows that suit NumPy, sums that suit BLAS.

A tensor is walked in boxes that stay in a core's L2 cache while a handful of NumPy calls work on them, so
main memory is read and written as often as the algorithm demands and no more. Three facts shape the code:

* A NumPy ufunc copies a broadcast operand through its buffer wherever the inner dimension is shorter than
  that buffer (8192 elements), which costs more than the arithmetic. So per-channel operands are written
  out once to rows at least that long, and a tensor is viewed as such rows.
* A matrix-vector product with ones is NumPy's fastest sum; `numpy.vecdot` is its fastest sum of products
  of long rows. Both leave partial sums of a few hundred to a few thousand values, which are added in float64.
* Masked copies and `numpy.where` branch at each element. Masks of bits do not.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.backends.cpu import numpy_float16
from cupy_syncbn.backends.cpu.memory import CACHE_LINE, scratch


def _l2_cache() -> int:
    """Return the bytes of a core's L2 cache; a common size where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return int(text.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 1 << 20


WORKSPACE_BYTES = 3 << 17
"""Bytes of a box that workspace is made for: two and the operands fit into a MiB."""
BOX_BYTES = min(max(_l2_cache() // 2, WORKSPACE_BYTES), 1 << 20)
"""Bytes of other boxes: what is read and what is written stay in a core's L2 cache."""
ROW = 8192
"""Elements of NumPy's ufunc buffer: the shortest row to which it applies an operand without a copy."""
COLUMNS = 512
"""Least width of the matrices whose columns are added up: their height, the length of a chain, is small."""
SHORT = 64
"""Rows of fewer elements are added up by columns: a call of BLAS for each would cost more than its sum."""
FEW = 2 * ROW
"""Elements that are too few to repay preparations, and that float64 adds up at little cost."""
CHAIN = 16
"""The longest column of so few elements that is added up in float32: it is 16 * 2^-24 = 1e-6 off at most."""
PARTIAL = 1024
"""The longest row that is added up in the precision of the data."""


class Box(NamedTuple):
    """A part of a tensor that one round of NumPy calls works on."""

    where: tuple[slice, slice, slice]
    shape: tuple[int, int, int]
    rows: tuple[int, ...]
    """Its shape for elementwise operations, to which the block's operands apply."""
    columns: tuple[int, int]
    """Its shape for sums by columns: each row is a whole number of (C, S) samples."""

    @property
    def per_channel(self) -> int:
        """How many values a channel has in it."""
        return self.shape[0] * self.shape[2]

    def apply(self, operation: np.ufunc, values: Array, operand: Array, out: Array) -> Array:
        """Compute ``operation(values, operand)``; the last box of a block may be shorter than the operand."""
        if operand.ndim == 1 and operand.size > self.rows[-1]:
            operand = operand[: self.rows[-1]]
        result: Array = operation(values, operand, out=out)
        return result


class Block(NamedTuple):
    """The boxes of some channels, and how per-channel operands are written out for them."""

    channels: slice
    operand: tuple[int, int, int] | None
    """Shape (samples, C, S) that a (C,) vector is written out to; None where (C, 1) applies as it is."""
    boxes: tuple[Box, ...]


@functools.lru_cache(maxsize=256)
def _blocks(shape: tuple[int, int, int], itemsize: int, box_bytes: int) -> tuple[Block, ...]:
    """Divide a tensor into blocks of channels, and these into boxes of about `box_bytes`.

    Rows of operands are between ROW and a box long: several samples where C*S is short of ROW, several
    channels of one sample where S is, and a part of one channel where S exceeds a box.
    """
    N, C, S = shape
    size = box_bytes // itemsize
    everything = slice(0, C), slice(0, S)
    if N * C * S <= FEW and N <= COLUMNS:
        few = next((k for k in range(-(-N // CHAIN), N // 4 + 1) if N % k == 0), 1)
        box = Box((slice(0, N), *everything), shape, shape, (N // few, few * C * S))
        return (Block(everything[0], None, (box,)),)
    if C * S < ROW:
        few = -(-COLUMNS // (C * S))  # samples in a row of a column sum
        fold = few * -(-ROW // (few * C * S))  # samples in a row of an elementwise operation
        boxes = []
        start = 0
        # As many samples as fill rows, then as many as fill columns, then the rest.
        for unit, most in ((fold, max(fold, size // (C * S) // fold * fold)), (few, fold), (1, few)):
            while N - start >= unit:
                n = min(most, (N - start) // unit * unit)
                width = min(unit, few) * C * S
                rows = (n // fold, fold * C * S) if unit == fold else (1, n * C * S)
                index = (slice(start, start + n), *everything)
                boxes.append(Box(index, (n, C, S), rows, (n * C * S // width, width)))
                start += n
        return (Block(everything[0], (min(fold, N), C, S), tuple(boxes)),)
    blocks = []
    if S < ROW:
        narrow = -(-ROW // S)
        # Blocks begin on cache lines where the tensor does.
        for channels in _split(C, C // max(narrow, min(4 * narrow, size // (N * S))), CACHE_LINE // itemsize):
            c = channels.stop - channels.start
            boxes = []
            for samples in _split(N, round(N * c * S / size)):
                n = samples.stop - samples.start
                boxes.append(Box((samples, channels, everything[1]), (n, c, S), (n, c * S), (n, c * S)))
            blocks.append(Block(channels, (1, c, S), tuple(boxes)))
        return tuple(blocks)
    pieces = _split(S, -(-S // size), _stretch(S))
    for channels in _split(C, -(-C * S // max(size, S))):
        c = channels.stop - channels.start
        boxes = []
        for n in range(N):
            for positions in pieces:
                s = positions.stop - positions.start
                boxes.append(Box((slice(n, n + 1), channels, positions), (1, c, s), (c, s), (1, c * s)))
        blocks.append(Block(channels, None, tuple(boxes)))
    return tuple(blocks)


def _split(length: int, parts: int, multiple: int = 1) -> list[slice]:
    """Split range(length) into `parts` slices of about one length, or fewer.

    They begin at multiples of a number if that leaves them about equal.
    """
    parts = max(1, min(parts, length))
    step = multiple if length // parts >= 2 * multiple else 1
    starts = [length * i // parts // step * step for i in range(parts)] + [length]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


class Tensor:
    """A tensor seen box by box in the accumulator's type: in place where memory allows, else by copies."""

    def __init__(self, name: str, array: Array, dtype: np.dtype[Any]) -> None:
        self.name, self.array, self.dtype = name, array, dtype
        self.half = array.dtype == np.float16 and array.dtype.isnative
        flags = array.flags
        self.direct = array.dtype == dtype and flags.aligned and (flags.c_contiguous or self._has_rows())

    def blocks(self, *, workspace: bool = False) -> tuple[Block, ...]:
        """Return the blocks to walk it in; `workspace` tells that boxes are to be copied in any case."""
        box_bytes = BOX_BYTES
        if workspace or not self.direct or self.array.shape[2] < SHORT:
            box_bytes = WORKSPACE_BYTES // 2 if self.half else WORKSPACE_BYTES  # conversions need as much
        return _blocks(self.array.shape, self.dtype.itemsize, box_bytes)

    def _has_rows(self) -> bool:
        """Tell whether the samples are contiguous, each by itself, and as long as a row."""
        _, C, S = self.array.shape
        steps, itemsize = self.array.strides, self.dtype.itemsize
        contiguous = (S == 1 or steps[2] == itemsize) and (C == 1 or steps[1] == S * itemsize)
        return contiguous and C * S >= ROW  # shorter samples share rows

    def read(self, box: Box) -> Array:
        """Return the box's values, to be left unchanged."""
        part: Array = self.array[box.where]
        if self.direct:
            return part.reshape(box.rows)
        held = scratch(self.name, box.shape, self.dtype)
        if self.half:
            numpy_float16.load(part, held)
        else:
            np.copyto(held, part)
        return held.reshape(box.rows)

    def place(self, box: Box) -> Array:
        """Return where to compute the box's new values, for `placed` to store."""
        if self.direct:
            return self.array[box.where].reshape(box.rows)
        return scratch(self.name, box.shape, self.dtype).reshape(box.rows)

    def placed(self, box: Box, values: Array) -> None:
        """Store what was computed in `place`."""
        if not self.direct:
            self.write(box, values)

    def write(self, box: Box, values: Array) -> None:
        """Store what was computed elsewhere, rounded to the tensor's type."""
        part = self.array[box.where]
        if self.half:
            numpy_float16.store(values, part)
        else:
            np.copyto(part, values.reshape(box.shape), casting="unsafe")


class Sums:
    """Σa and Σab per channel over the boxes of a block, in float64 from partial sums in the data's type."""

    def __init__(self, shape: tuple[int, ...], block: Block, dtype: np.dtype[Any]) -> None:
        N, _, S = shape
        c = block.channels.stop - block.channels.start
        self._total: tuple[Array, Array] | None = None
        self._stretch = _stretch(S)
        # Σa and Σab over each stretch
        self._partial = None if S < SHORT else scratch("partial", (2, N, c, -(-S // self._stretch)), dtype)

    def add(self, box: Box, a: Array, b: Array) -> None:
        """Add a box; every box of the block must be added once. The scratch "difference" is overwritten."""
        if self._partial is None:
            if box.columns[0] > CHAIN and a.size <= FEW:
                wide = a.astype(np.float64, copy=False)
                a, b = wide, wide if b is a else b.astype(np.float64, copy=False)
            sums = _column_sums(a, box)
            product = scratch("difference", a.shape, a.dtype)  # which may be a or b
            products = _column_sums(np.multiply(a, b, out=product), box)
            if self._total is not None:
                sums += self._total[0]
                products += self._total[1]
            self._total = sums, products
            return
        samples, _, positions = box.where
        n, c, s = box.shape
        length = self._stretch
        first, whole = positions.start // length, s // length
        partial = self._partial[:, samples, :, first : first + whole]
        if whole * length == s:  # stretches of all channels follow each other: one matrix a sample
            rows = (n, c * whole, length)
            partial = partial.reshape(2, *rows[:2])
            a, b = a.reshape(rows), b.reshape(rows)
        else:
            a, b = a.reshape(box.shape), b.reshape(box.shape)
            rest = self._partial[:, samples, :, first + whole]
            _sum_rows(a[:, :, whole * length :], b[:, :, whole * length :], rest)
            stretches = (n, c, whole, length)
            a, b = (values[:, :, : whole * length].reshape(stretches) for values in (a, b))
        _sum_rows(a, b, partial)

    def total(self) -> tuple[Array, Array]:
        """Return both sums, (C,) each."""
        if self._partial is None:
            assert self._total is not None
            return self._total
        sums, products = np.add.reduce(self._partial, axis=(1, 3), dtype=np.float64)
        return sums, products


def _sum_rows(a: Array, b: Array, sums: Array) -> None:
    """Write Σa and Σab over the last axis to ``sums[0]`` and ``sums[1]``."""
    np.matmul(a, _ones(a.shape[-1], a.dtype), out=sums[0])
    np.vecdot(a, b, out=sums[1])


@functools.cache
def _stretch(S: int) -> int:
    """Return the length that rows of `S` are cut to for sums: if possible, a divisor near PARTIAL."""
    few = -(-S // PARTIAL)
    return next((S // k for k in range(few, 4 * few) if S % k == 0), PARTIAL)


def _column_sums(values: Array, box: Box) -> Array:
    """Σ values per channel, (C,) in float64."""
    _, c, s = box.shape
    partial: Array = _ones(box.columns[0], values.dtype) @ values.reshape(box.columns)
    partial = partial.reshape(-1, c, s)
    if s > 1 and partial.size > ROW:
        partial = (partial @ _ones(s, values.dtype))[:, :, None]
    total: Array = np.add.reduce(partial, axis=(0, 2), dtype=np.float64)
    return total


@functools.lru_cache(maxsize=64)
def _ones(length: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(length, dtype)


def row_of(name: str, values: Array, block: Block) -> Array:
    """Write out the block's part (c,) of a vector to an operand for `apply`."""
    column: Array = values[:, None]
    if block.operand is None:
        return column
    row = scratch(name, block.operand, values.dtype)
    np.copyto(row, column)
    return row.reshape(-1)
