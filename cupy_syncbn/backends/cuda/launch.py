"""How the CUDA kernels share a tensor among blocks: the only place where launches are shaped.

See kernels/common.cuh for the two ways to walk a tensor. Nothing here needs CUDA.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from cupy_syncbn.backends.cuda.kernels import REGISTERS, vector_width

THREADS = 256
"""Threads per block, as in common.cuh."""

BLOCKS = 1
"""For each that a multiprocessor surely has room for, where there is work for them. More would begin as
others end, and each costs what it does before and after its vectors."""

MIN_ITEMS = 4
"""Vectors per thread: as many as it loads at once. Fewer would cost more time for the sum over blocks."""

MAX_ITEMS = 64
"""Vectors per thread: the length of its sums in float32, whose rounding errors grow with it. 64 keep the
variance within 1e-6, and give a block 64 KiB to 256 KiB to read."""

ROW_BYTES = 256
"""Bytes of a matrix row that a block reads: two cache lines. Wider blocks would have more channels, and more
sums to pass on for the same number of elements."""

SMALL_MAP = 64
"""Threads side by side that the maps of several channels should fill; one map may need up to THREADS."""


class Launch(NamedTuple):
    """The launch of a kernel on a tensor."""

    columns: bool
    """Whether the tensor is walked as a matrix; see common.cuh for the rest."""
    width: int
    """Elements per vector."""
    lanes: int
    group: int
    per_split: int
    groups: int
    splits: int

    @property
    def blocks(self) -> int:
        return self.groups * self.splits


def resident(width: int) -> int:
    """Return the blocks that a multiprocessor surely has room for: MIN_BLOCKS of common.cuh."""
    return 65536 // (THREADS * REGISTERS[width])


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def launch_for(shape: tuple[int, int, int], itemsize: int, aligned: bool, multiprocessors: int) -> Launch:
    """Shape the launch for a contiguous tensor of `shape` (N, C, S), with S = 1 for channels-last data.

    Tensors are `aligned` if all of them begin at multiples of 16 bytes.
    """
    N, C, S = shape
    width = vector_width(itemsize) if aligned else 1
    columns = _columns(C, S, itemsize, width)
    if columns:
        width, lanes, group = columns
        unit = THREADS // lanes
        steps = _ceil(N, unit)
    else:
        lanes, group, unit = 1, 1, THREADS
        if S // width >= 2**31:
            raise ValueError(
                f"expected fewer than {2**31 * width} elements per channel and sample (got {S}): "
                "cut each into several samples: the statistics are the same"
            )
        steps = _ceil(N * max(S // width, 1), unit)
    groups = _ceil(C, group)
    items = _ceil(steps, max(1, multiprocessors * BLOCKS * resident(width) // groups))
    items = min(max(items, MIN_ITEMS), MAX_ITEMS)
    return Launch(columns is not None, width, lanes, group, items * unit, groups, max(1, _ceil(steps, items)))


def _columns(C: int, S: int, itemsize: int, width: int) -> tuple[int, int, int] | None:
    """Return the width of vectors, lanes and group for the matrix (N, C*S); None to walk row by row."""
    width = width if C * S % width == 0 else 1
    if S == 1:
        vectors = C // width
        lanes = _ceil(vectors, _ceil(vectors, ROW_BYTES // (width * itemsize)))  # as even as may be
        return width, lanes, lanes * width
    # The least number of channels that are whole vectors together, and of threads for them.
    channels = width // math.gcd(S, width)
    lanes = channels * S // width
    # Maps of odd sizes lack 16-byte vectors as a matrix; longer ones have enough of them row by row.
    long_rows = S // vector_width(itemsize) >= 16
    if lanes > THREADS or (width < vector_width(itemsize) and long_rows):
        return None
    several = min(max(1, SMALL_MAP // lanes), _ceil(C, channels))
    return width, several * lanes, several * channels
