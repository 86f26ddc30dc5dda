"""Every batch as a 3-D array (outer, C, inner), without moving it in memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"  # or a cupy.ndarray: it has the same methods


class Layout(NamedTuple):
    """Where the channels of a batch are, in its shape and in memory.

    A batch stored channels-first is (N, C, S), S being the product of the spatial sizes; one stored
    channels-last is (N*S, C, 1). Per-channel algorithms need to know nothing else.
    """

    shape: tuple[int, ...]
    """Shape of the batch, as the caller sees it."""
    axes: tuple[int, ...]
    """The caller's axes in memory order."""
    channels_last: bool
    """Whether the channels are innermost in memory, whatever the shape says."""

    @classmethod
    def of(cls, x: Array, channels_last: bool) -> Layout:
        """Layout of `x`, whose shape is (N, C, *spatial), or (N, *spatial, C) if `channels_last`.

        The order in memory is read off the strides: a transposed view is not copied to be computed on.
        """
        channel = x.ndim - 1 if channels_last else 1
        spatial = [axis for axis in range(1, x.ndim) if axis != channel]
        steps = [abs(x.strides[axis]) for axis in spatial if x.shape[axis] > 1]
        in_memory = channels_last
        if steps and x.shape[channel] > 1:
            in_memory = abs(x.strides[channel]) < min(steps)
        axes = (0, *spatial, channel) if in_memory else (0, channel, *spatial)
        return cls(x.shape, axes, in_memory)

    @property
    def shape_3d(self) -> tuple[int, int, int]:
        """Shape (outer, C, inner) of the batch in memory order."""
        sizes = [self.shape[axis] for axis in self.axes]
        if self.channels_last:
            return math.prod(sizes[:-1]), sizes[-1], 1
        return sizes[0], sizes[1], math.prod(sizes[2:])

    @property
    def values_per_channel(self) -> int:
        """How many values a channel has, N*S."""
        outer, _, inner = self.shape_3d
        return outer * inner

    def as_3d(self, array: Array) -> Array:
        """`array`, of this layout's shape, as (outer, C, inner): a view wherever its strides permit."""
        return array.transpose(self.axes).reshape(self.shape_3d)

    def empty(self, xp: Any, dtype: Any) -> Array:
        """Allocate an array of this shape, contiguous in this memory order, in the namespace `xp`."""
        storage: Array = xp.empty([self.shape[axis] for axis in self.axes], dtype)
        return storage.transpose(np.argsort(self.axes).tolist())
