"""A backend's operations, and the nouns they take: batch normalization on the arrays of one library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from cupy_syncbn.arrays import Array

LEAST_WEIGHT = 1e-5
"""In a normalization in place; as in formulas.h."""


class Running(NamedTuple):
    """The running statistics: training updates them in place, evaluation takes them as given."""

    mean: Array
    var: Array
    num_batches_tracked: Array | None = None
    momentum: float | None = None
    """None for the cumulative average."""


class BatchSums(NamedTuple):
    """The sums that the ranks have added up of their batches; see `vector`."""

    vector: Array
    squares: Array | None = None
    """The second vector, of float64 data."""
    ranks: int = 1
    mailbox: int = 0
    """As an argument of `Backend.input_gradient`, for the trailer of the last of these sums."""


class Affine(NamedTuple):
    """The step ``(x - mean) / sqrt(var + eps) * weight + bias``."""

    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5


class Epilogue(NamedTuple):
    """The rest of the same pass: ``activation(y + residual)``, and what becomes of x."""

    residual: Array | None = None
    slope: float | None = None
    """Of the activation below zero: 0 for ReLU, None for no activation."""
    in_place: bool = False
    """Whether the backward gets y in place of x: then |weight| is at least `LEAST_WEIGHT`."""


class Reduced(NamedTuple):
    """The sums that the backward starts with."""

    global_sums: Array
    """The vector of the backward: this rank's sums, until the ranks have added them up in place."""
    local_sums: Array
    """A copy that stays this rank's; its trailer may be missing."""
    gradient: Any
    """The gradient of the output, as `input_gradient` takes it."""


class ParameterSums(NamedTuple):
    """The sums that the gradients of weight and bias are made of."""

    vector: Array
    scale: float = 1.0
    weight_type: Any = None
    """None if no gradient of the weight is wanted; so is `bias_type`."""
    bias_type: Any = None


class Backend(Protocol):
    """The operations of a backend; shapes are (outer, C, inner) for tensors and (C,) for the rest.

    A trailer ends a vector: it is the caller's.
    """

    def overlaps(self, a: Array, b: Array) -> bool:
        """Tell whether two arrays share memory."""

    def as_kernel_input(self, x: Array) -> Array:
        """Return a tensor that the other operations take: `x`, or a copy if they need one."""

    def check_device(self, x: Array) -> None:
        """Check that an array is where the operations compute; ValueError if not."""

    def empty(self, shape: tuple[int, int, int], dtype: Any) -> Array:
        """Allocate a tensor, contiguous."""

    def statistics(self, x: Array, trailer: tuple[float, ...]) -> tuple[Array, Any]:
        """Reduce `x` to the vector of the forward; also return the argument of `centered_squares`."""

    def centered_squares(
        self, local_sums: Any, vector: Array, trailer: tuple[float, ...], mailbox: int
    ) -> Array:
        """Return the second vector of float64 data, ``[Σ(x - mean)² (C) | trailer]``.

        The mean is that of the `vector` which the ranks have added up, whose trailer is for the mailbox.
        """

    def normalize(
        self,
        x: Array,
        y: Array,
        batch: BatchSums | None,
        running: Running | None,
        affine: Affine,
        epilogue: Epilogue,
    ) -> tuple[Any, list[Callable[[], object]]]:
        """Write y by the statistics of the batch, or without one by the running ones.

        Returns a record for the backward, of a type of the backend's own, and what is to be called to update
        the running statistics. A kernel may have updated them: but not if a trailer that the host has not
        seen tells of a fault.
        """

    def reduce_gradients(
        self, dy: Array, x: Array, normalization: Any, dresidual: Array | None, trailer: tuple[float, ...]
    ) -> Reduced:
        """Reduce `dy` and `x` to the vector of the backward, and write dresidual.

        Behind a normalization in place `x` is y, here and in `input_gradient`.
        """

    def input_gradient(
        self,
        gradient: Any,
        x: Array,
        normalization: Any,
        dx: Array,
        sums: Array | None,
        parameters: ParameterSums,
        mailbox: int,
    ) -> tuple[Array | None, Array | None]:
        """Write dx, which may be `gradient`, by the vector `sums`, None where the statistics were constants.

        `mailbox` is an address in the host's memory to which a kernel copies the trailer of `sums`; 0 where
        the host has seen that, as always on a CPU.
        Returns the gradients of weight and bias in the types asked for, None for None.
        """
