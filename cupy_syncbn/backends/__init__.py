"""The backends: modules with the same operations on the arrays of one library.

A backend computes on (outer, C, inner) arrays and never communicates: what ranks have to add up, it
returns as one float64 vector. In the forward that is, with one pivot a channel,

    [count * pivot (C) | count * pivot² (C) | Σ(x - pivot) (C) | Σ(x - pivot)² + 2 pivot Σ(x - pivot) (C)
     | count | fault | tag | tag²]

A rank's pivot is a value near its mean, rounded to 12 significant bits, so that both products with it are
exact: 24 bits of pivot² and a count below 2^29 fit into the 53 bits of a float64. Re-centred on a common
pivot after the sum, they cancel exactly, and the variance keeps its accuracy at any offset. The shorter
[count * mean | m2 + count * mean² | ...] loses 1e-16 mean²/var of it: 3e-6 at a mean of 1e5 standard
deviations, which float32 data can show (`scripts/benchmarks/accuracy.py`). Where zero lies within the
data the pivot is zero, and the vector is the plain [0 | 0 | Σx | Σx² | ...].

In the backward the vector is ``[sum_dy (C) | sum_dy_xmu (C) | fault | tag | tag²]``. Its last three, the
trailer, are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupy_syncbn.backends.layout import Array, Layout

__all__ = ["Array", "Backend", "Layout", "Normalization", "Running", "array_module", "backend_of"]


@dataclass(frozen=True, slots=True)
class Normalization:
    """What a forward applied to each element, and its backward needs again.

    ``y = activation((x - mean) * invstd * weight + bias + residual)``; arrays are float64 of shape (C,).
    """

    mean: Array
    var: Array
    invstd: Array
    weight: Array | None
    bias: Array | None
    slope: float | None
    """Slope of the activation below zero: 0 for ReLU, None for no activation."""
    count: float
    """Values a channel over all ranks."""


class Running(NamedTuple):
    """The running statistics, which a training forward updates in place."""

    mean: Array
    var: Array
    num_batches_tracked: Array | None
    momentum: float | None
    """None for the cumulative average."""


class Backend(Protocol):
    """The operations of a backend; shapes are (outer, C, inner) for tensors and (C,) for the rest."""

    def empty(self, layout: Layout, dtype: Any) -> Array:
        """Allocate a tensor."""

    def overlaps(self, a: Array, b: Array) -> bool:
        """Tell whether two arrays share memory."""

    def vector(self, rows: int, channels: int, trailer: tuple[float, ...]) -> Array:
        """Return an exchange vector of zeros that ends in `trailer`."""

    def statistics(self, x: Array, trailer: tuple[float, ...]) -> Array:
        """Reduce `x` to the exchange vector of the forward."""

    def normalize(
        self,
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

    def normalize_fixed(
        self,
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

    def reduce_gradients(
        self,
        dy: Array,
        x: Array,
        residual: Array | None,
        normalization: Normalization,
        trailer: tuple[float, ...],
    ) -> Array:
        """Reduce `dy` and `x` to the exchange vector of the backward."""

    def parameter_gradients(
        self, sums: Array, normalization: Normalization, scale: float, dtype: Any
    ) -> tuple[Array | None, Array | None]:
        """Gradients of weight and bias from the leading ``[sum_dy | sum_dy_xmu]`` of a vector."""

    def input_gradient(
        self,
        dy: Array,
        x: Array,
        residual: Array | None,
        normalization: Normalization,
        vector: Array | None,
        dx: Array,
        dresidual: Array | None,
    ) -> None:
        """Write dx, and dresidual if given; `vector` is None where the statistics were constants."""


def backend_of(array: object) -> Backend:
    """Return the backend that computes on `array`.

    Raises
    ------
    TypeError
        If `array` is not a NumPy array.
    """
    if isinstance(array, np.ndarray):
        from cupy_syncbn.backends import numpy_backend

        return numpy_backend
    raise TypeError(
        f"expected a NumPy array (got {type(array).__module__}.{type(array).__qualname__}): "
        "convert it, for instance with numpy.asarray"
    )


def array_module(device: str | None) -> ModuleType:
    """Return the array library of `device`; None is the best one there is.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if device in (None, "cpu"):
        return np
    raise ValueError(f"expected device 'cpu' or None (got {device!r}): this version computes with NumPy only")
