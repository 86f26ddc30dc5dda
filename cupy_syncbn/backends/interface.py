"""What a backend offers: the operations of batch normalization on the arrays of one library."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from cupy_syncbn.arrays import Array
from cupy_syncbn.backends.layout import Layout


class Running(NamedTuple):
    """The running statistics, which a training forward updates in place."""

    mean: Array
    var: Array
    num_batches_tracked: Array | None
    momentum: float | None
    """None for the cumulative average."""


class Backend(Protocol):
    """The operations of a backend; shapes are (outer, C, inner) for tensors and (C,) for the rest.

    `residual` is added before the activation, whose slope below zero is `slope`: 0 for ReLU, None for no
    activation. `trailer` ends a vector.
    """

    def empty(self, layout: Layout, dtype: Any) -> Array:
        """Allocate a batch of a layout, contiguous in its memory order."""

    def overlaps(self, a: Array, b: Array) -> bool:
        """Tell whether two arrays share memory."""

    def as_kernel_input(self, x: Array) -> Array:
        """Return a tensor that the other operations take: `x`, or a copy if they need one."""

    def check_device(self, x: Array) -> None:
        """Check that an array is where the operations compute; ValueError if not."""

    def statistics(self, x: Array, trailer: tuple[float, ...]) -> tuple[Array, Any]:
        """Reduce `x` to the exchange vector of the forward; also return what `centered_squares` needs."""

    def centered_squares(self, local: Any, vector: Array, trailer: tuple[float, ...]) -> Array:
        """Return the vector of a second exchange, ``[Σ(x - mean)² (C) | trailer]``.

        The mean is that of the exchanged `vector` of the first.
        """

    def normalize(
        self,
        x: Array,
        y: Array,
        vector: Array,
        squares: Array | None,
        weight: Array | None,
        bias: Array | None,
        running: Running | None,
        ranks: int,
        eps: float,
        residual: Array | None,
        slope: float | None,
    ) -> Any:
        """Write y by the statistics in the exchanged vectors, and update the running statistics.

        `squares` is that of the second exchange, or None if there was none. A trailer that the host has not
        seen may tell of a fault: the running statistics of the `ranks` ranks are not updated then.

        What it returns is for the backward: of the backend's own type.
        """

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
    ) -> Any:
        """Write y by given statistics."""

    def reduce_gradients(
        self,
        dy: Array,
        x: Array,
        normalization: Any,
        dresidual: Array | None,
        trailer: tuple[float, ...],
    ) -> tuple[Array, Array, Any]:
        """Reduce `dy` and `x` to the exchange vector of the backward, and write dresidual.

        Returns the vector, a copy of it that stays this rank's (its trailer may be missing), and what
        `input_gradient` takes for the gradient of the output.
        """

    def input_gradient(
        self,
        gradient: Any,
        x: Array,
        normalization: Any,
        dx: Array,
        sums: Array | None,
        parameter_sums: Array,
        parameter_scale: float,
        weight_type: Any,
        bias_type: Any,
    ) -> tuple[Array | None, Array | None]:
        """Write dx by the vector `sums`, None where the statistics were constants.

        Returns the gradients of weight and bias by the vector `parameter_sums`, times `parameter_scale`, in
        the types asked for; None for None.
        """
