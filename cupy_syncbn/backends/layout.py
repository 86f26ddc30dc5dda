"""Every batch as a 3-D array (outer, C, inner), without moving it in memory."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from cupy_syncbn.arrays import Array


class Layout(NamedTuple):
    """Where the channels of a batch are, in its shape and in memory.

    A batch stored channels-first is (N, C, S), S being the product of the spatial sizes; one stored
    channels-last is (N*S, C, 1). Per-channel algorithms need to know nothing else.
    """

    shape: tuple[int, ...]
    """Shape of the batch, as the caller sees it."""
    axes: tuple[int, ...]
    """The caller's axes in memory order."""
    inverse: tuple[int, ...]
    """The memory's axes in the caller's order."""
    is_in_order: bool
    """Whether these are all in order."""
    memory_shape: tuple[int, ...]
    """Shape of the batch in memory order."""
    shape_3d: tuple[int, int, int]
    """The same as (outer, C, inner)."""

    @classmethod
    def of(cls, x: Array, channels_last: bool) -> Layout:
        """Layout of `x`, whose shape is (N, C, *spatial), or (N, *spatial, C) if `channels_last`.

        The order in memory is read off the strides: a transposed view is not copied to be computed on.
        """
        return _layout(x.shape, x.strides, channels_last)

    def as_3d(self, array: Array) -> Array:
        """`array`, of this layout's shape, as (outer, C, inner): a view wherever its strides permit."""
        return (array if self.is_in_order else array.transpose(self.axes)).reshape(self.shape_3d)

    def as_batch(self, array: Array) -> Array:
        """Undo `as_3d`."""
        batch = array.reshape(self.memory_shape)
        return batch if self.is_in_order else batch.transpose(self.inverse)


@functools.lru_cache(maxsize=256)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], channels_last: bool) -> Layout:
    channel = len(shape) - 1 if channels_last else 1
    spatial = [axis for axis in range(1, len(shape)) if axis != channel]
    steps = [abs(strides[axis]) for axis in spatial if shape[axis] > 1]
    innermost = channels_last
    if steps and shape[channel] > 1:
        innermost = abs(strides[channel]) < min(steps)
    axes = (0, *spatial, channel) if innermost else (0, channel, *spatial)
    inverse = tuple(axes.index(axis) for axis in range(len(axes)))
    memory_shape = tuple(shape[axis] for axis in axes)
    N, C, S = shape[0], shape[channel], math.prod(shape[axis] for axis in spatial)
    is_in_order = axes == tuple(range(len(axes)))
    shape_3d = (N * S, C, 1) if innermost else (N, C, S)
    return Layout(shape, axes, inverse, is_in_order, memory_shape, shape_3d)
