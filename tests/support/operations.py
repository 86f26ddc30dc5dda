"""A step by the operations of a backend alone, on (N, C, S) arrays of one rank."""

from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums
from support.arrays import random_channels
from support.compare import assert_close, assert_identical
from support.reference import BatchNorm

TRAILER = (0.0, 7.0, 49.0, 5.0, 25.0)
"""What the vectors end with: it must come out as it went in."""
PLAIN = Affine()


class Forward(NamedTuple):
    """A forward that has written y; the running statistics are still to be written."""

    x: Any
    """As the operations take it."""
    y: Any
    batch: BatchSums | None
    normalization: Any
    writes: list
    has_residual: bool


class Backward(NamedTuple):
    """The results of a backward, and its vector."""

    dx: Any
    dresidual: Any
    dweight: Any
    dbias: Any
    sums: Any


def of_type(dtype):
    """Return the type of results, which have the machine's byte order."""
    return np.dtype(dtype).newbyteorder("=")


@np.errstate(all="ignore")  # as functional.py has it
def local_batch(operations, x):
    """Return the sums of a batch on one rank."""
    x = operations.as_kernel_input(x)
    vector, local_sums = operations.statistics(x, TRAILER)
    assert_identical(vector[-5:], np.array(TRAILER))
    squares = None
    if x.dtype.itemsize == 8:
        squares = operations.centered_squares(local_sums, vector, TRAILER, 0)
        assert_identical(squares[-5:], np.array(TRAILER))
    return BatchSums(vector, squares)


@np.errstate(all="ignore")
def forward(operations, x, *, batch=None, running=None, affine=PLAIN, residual=None, slope=None, y=None):
    """Normalize by the statistics of a batch, or without one by the running ones.

    As in functional.py, the result is copied to a `y` that the operations cannot write to.
    """
    x = operations.as_kernel_input(x)
    if y is None:
        y = operations.empty(x.shape, of_type(x.dtype))
    written = operations.as_kernel_input(y)
    is_copy = not operations.overlaps(written, y)
    added = None if residual is None else operations.as_kernel_input(residual)
    normalization, writes = operations.normalize(x, written, batch, running, affine, Epilogue(added, slope))
    if is_copy:
        y[...] = written
    return Forward(x, y, batch, normalization, writes, residual is not None)


@np.errstate(all="ignore")
def backward(operations, done, dy, *, scale=1.0, weight_type=np.float64, bias_type=np.float64):
    """Compute the gradients of a forward; those of weight and bias are of this rank, times `scale`."""
    shape, dtype = done.x.shape, of_type(done.x.dtype)
    dx = operations.empty(shape, dtype)
    dresidual = operations.empty(shape, dtype) if done.has_residual else None
    dy = operations.as_kernel_input(dy)
    sums, local_sums, gradient = operations.reduce_gradients(
        dy, done.x, done.normalization, dresidual, TRAILER
    )
    assert_identical(sums[-5:], np.array(TRAILER))
    C = shape[1]
    assert_identical(local_sums[: 2 * C], sums[: 2 * C])
    assert not np.shares_memory(local_sums, sums)
    parameters = ParameterSums(local_sums, scale, weight_type, bias_type)
    used = None if done.batch is None else sums
    dweight, dbias = operations.input_gradient(gradient, done.x, done.normalization, dx, used, parameters, 0)
    return Backward(dx, dresidual, dweight, dbias, sums)


def activation_of(slope):
    """Return the name by which the reference knows an activation."""
    return None if slope is None else "relu" if slope == 0 else ("leaky_relu", slope)


def check_step(
    operations, x, dy, *, residual=None, slope=None, running=None, y=None, eps=1e-5, tolerance=None
):
    """Compare a step with the reference: of training, or with `running` of evaluation."""
    C = x.shape[1]
    rng = np.random.default_rng(1)
    weight, bias = random_channels(rng, C, "f8" if x.dtype.itemsize == 8 else "f4")
    wide = np.dtype(np.longdouble if x.dtype.itemsize == 8 else np.float64)
    reference = BatchNorm(C, activation=activation_of(slope), eps=eps, dtype=wide)
    reference.weight, reference.bias = weight.astype(wide), bias.astype(wide)
    batch = None
    if running is None:
        batch = local_batch(operations, x)
    else:
        reference.training = False
        reference.running_mean, reference.running_var = (a.astype(wide) for a in running[:2])
    copies = [None if a is None else a.copy() for a in (x, dy, residual)]

    affine = Affine(weight, bias, eps)
    done = forward(
        operations, x, batch=batch, running=running, affine=affine, residual=residual, slope=slope, y=y
    )
    assert done.writes == []
    gradients = backward(operations, done, dy, weight_type=weight.dtype, bias_type=bias.dtype)
    for array, copy in zip((x, dy, residual), copies, strict=True):
        assert_identical(array, copy)
    assert_close(done.y, reference(x, residual), tolerance=tolerance)
    expected = reference.backward(dy)
    dx, dresidual = expected if residual is not None else (expected, None)
    assert_close(gradients.dx, dx, tolerance=tolerance)
    if residual is not None:
        assert_close(gradients.dresidual, dresidual, tolerance=tolerance)
    assert_close(gradients.dweight, reference.weight_grad, tolerance=tolerance)
    assert_close(gradients.dbias, reference.bias_grad, tolerance=tolerance)
    return done, gradients
