"""How the CUDA kernels share a tensor among blocks: the only place where launches are shaped.

See kernels/common.cuh for the two ways to walk a tensor. Nothing here needs CUDA.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from cupy_syncbn.backends.cuda.kernels import vector_width

THREADS = 256
"""Threads per block, as in common.cuh."""

BLOCKS = 1
"""For each that a multiprocessor surely has room for, where there is work for them. More would begin as
others end, and each costs what it does before and after its vectors."""

MIN_BLOCKS = 3
"""Blocks for which a multiprocessor has the registers, as in common.cuh."""

AMPLE = 164 << 10
"""Bytes of shared memory per multiprocessor, of an A100: enough for MIN_BLOCKS of any kind."""

MIN_ITEMS = 4
"""Vectors per thread: as many as it loads at once. Fewer would cost more time for the sum over blocks."""

MAX_ITEMS = 64
"""Vectors per thread: the length of its sums in float32, whose rounding errors grow with it. 64 keep the
variance within 1e-6, and give a block 64 KiB to 256 KiB to read."""

MAX_SPLITS = 65535
"""The most blocks that CUDA takes in the grid's second direction."""

ROW_BYTES = 256
"""Bytes of a matrix row that a block reads: two cache lines. Wider blocks would have more channels, and more
sums to pass on for the same number of elements."""

SMALL_MAP = 64
"""Threads side by side that the maps of several channels should fill; one map may need up to THREADS."""

MAX_GROUP = 256
"""Channels per block, as in common.cuh."""


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


def resident(width: int, shared: int) -> int:
    """Return the blocks that a multiprocessor has room for, by its registers and `shared` bytes of memory."""
    # Two float64 sums for each element, and the constants of a group.
    return max(1, min(MIN_BLOCKS, shared // (16 * THREADS * width + 4096)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def launch_for(
    shape: tuple[int, int, int], itemsize: int, aligned: bool, multiprocessors: int, shared: int = AMPLE
) -> Launch:
    """Shape the launch for a contiguous tensor of `shape` (N, C, S), with S = 1 for channels-last data.

    Tensors are `aligned` if all of them begin at multiples of 16 bytes. Each of the GPU's multiprocessors has
    `shared` bytes of shared memory.
    """
    N, C, S = shape
    width = vector_width(itemsize) if aligned else 1

    def room() -> int:
        return multiprocessors * BLOCKS * resident(width, shared)

    columns = _columns(C, S, itemsize, width, room())
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
    items = _ceil(steps, max(1, room() // groups))
    items = max(min(max(items, MIN_ITEMS), MAX_ITEMS), _ceil(steps, MAX_SPLITS))
    return Launch(columns is not None, width, lanes, group, items * unit, groups, max(1, _ceil(steps, items)))


def _columns(C: int, S: int, itemsize: int, width: int, room: int) -> tuple[int, int, int] | None:
    """Return the width of vectors, lanes and group for the matrix (N, C*S); None to walk row by row.

    The GPU has `room` for so many blocks at once.
    """
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
    groups = _ceil(C, channels)
    several = max(
        SMALL_MAP // lanes, _ceil(groups, room)
    )  # groups that find no room would begin as others end
    several = max(1, min(several, groups, THREADS // lanes, MAX_GROUP // channels))
    return width, several * lanes, several * channels
