"""The algorithm: statistics, exchange, normalize; reduce, exchange, apply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array, as_array, module_of
from cupy_syncbn.backends import backend_of
from cupy_syncbn.backends.layout import Layout
from cupy_syncbn.checks import (
    Activation,
    activation_slope,
    check_grad_reduction,
    check_input,
    check_output,
    check_output_gradient,
    check_parameter,
    check_running,
    check_settings,
)
from cupy_syncbn.comm.call import Call
from cupy_syncbn.comm.groups import ProcessGroup, SingleProcessGroup, as_group

if TYPE_CHECKING:
    from mpi4py import MPI


class Saved(NamedTuple):
    """What a forward keeps for its backward. `x` is kept as it is, not copied."""

    x: Array
    """(outer, C, inner), see `Layout`."""
    has_residual: bool
    layout: Layout
    normalization: Any
    """The backend's: what it did to each element."""
    weight_type: Any
    """None if there was no weight."""
    bias_type: Any
    constant_statistics: bool
    """Whether running statistics were used, which do not depend on x."""
    group: ProcessGroup | MPI.Intracomm | None
    synchronized: bool
    call: Call
    input_kept: bool
    """False if the output was written over `x`."""
    sums: tuple[Array, Array | None] | None
    """The exchanged vectors: of all ranks, and squares for float64 data. None with running statistics."""


class Gradients(NamedTuple):
    """Gradients with respect to the arguments of `sync_batch_norm`; None for those not given.

    Parameters
    ----------
    x : array
        Of the shape, type and memory order of the argument.
    weight, bias : array of shape (C,)
        This rank's, or the sum or mean over the ranks, by `grad_reduction`.
    residual : array
        As `x`.
    """

    x: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


@np.errstate(all="ignore")  # infinities and NaN are the data's, and pass through
def sync_batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    num_batches_tracked: Array | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | MPI.Intracomm | None = None,
    channels_last: bool = False,
    activation: Activation = None,
    residual: Array | None = None,
    out: Array | None = None,
    call: Call | None = None,
) -> tuple[Array, Saved]:
    """Normalize a batch by the mean and variance of each channel over all ranks.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` (Ioffe and Szegedy 2015).

    Parameters
    ----------
    x : array of shape (N, C, *spatial), or (N, *spatial, C) if `channels_last`
        This rank's part of the batch, of type float16, bfloat16, float32 or float64; N may differ between
        ranks and be 0. A transposed view is computed in its memory order, without a copy. An array of
        NumPy or CuPy, or what shares its memory with them: a torch tensor (without its graph), a JAX array,
        anything with DLPack or ``__array__``.
    weight, bias : array of shape (C,), optional
        Scale and offset, of the type of `x`, or float32 for 16-bit `x`; so are the running statistics.
    running_mean, running_var : array of shape (C,), optional
        Running statistics: updated in place when training, used in place of the batch's when not.
    num_batches_tracked : int64 array of shape (), optional
        Counts the training batches that had any data.
    training : bool
        Normalize by the batch's statistics, over all ranks. Without it and without running statistics,
        this rank's own batch statistics are used.
    momentum : float or None
        Share of the batch in the new running statistics; None is ``1 / num_batches_tracked``, so that
        they are the average over all batches. The running variance takes the unbiased variance.
    eps : float
        Added to the variance.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all.
    channels_last : bool
        Whether the channels are the last axis of `x`.
    activation : {None, "relu", "leaky_relu"} or ("leaky_relu", slope)
        Applied to the result.
    residual : array like `x`, optional
        Added before the activation.
    out : array like `x`, optional
        Where to write y, of NumPy or on the GPU. It must not overlap `x`, which the backward needs, or
        `residual`; but without training it may be `x`, if no backward follows.
    call : Call, optional
        What this call is named in errors, and compared by between ranks; layers give theirs.

    Returns
    -------
    y : array like `x`
        The result, in the memory order of `x`: of NumPy, or of CuPy on a GPU.
    saved : Saved
        For `sync_batch_norm_backward`. It refers to `x`: leave it unchanged until then. With an activation
        it also holds one bit an element.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong. Nothing has been changed then, and the other ranks raise RemoteRankError.
    RemoteRankError
        If another rank found its input wrong.
    RankMismatchError
        If the ranks are in different calls.
    CollectiveTimeoutError
        If a rank does not come within the group's timeout.

    Notes
    -----
    **Collective** when training: every rank of the group must call it. One allreduce of 32C + 32 bytes; for
    float64 data a second, of 8C + 24.

    Examples
    --------
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, saved = sync_batch_norm(x, eps=0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> sync_batch_norm_backward(np.ones_like(y), saved).x
    array([[0., 0.],
           [0., 0.]])
    """
    peers = as_group(process_group) if training else _LOCAL
    call = call or _call(x, weight, running_mean, channels_last)
    library = _library(x, weight, running_mean)
    with call.preparing(peers, 4 * call.channels + 4, library):
        check_settings(eps, momentum)
        given, in_place = out, out is x
        x, residual, out = as_array(x), as_array(residual), as_array(out, host=False)
        if in_place and isinstance(out, np.ndarray):  # of a subclass, it has become two views
            out = x
        backend, layout = check_input(x, channels_last, call.channels)
        dtype = x.dtype.newbyteorder("=")
        running = check_running(
            backend, running_mean, running_var, num_batches_tracked, momentum, dtype, training, call
        )
        for name, values in (("weight", weight), ("bias", bias)):
            if values is not None:
                check_parameter(backend, name, values, dtype, call)
        slope = activation_slope(activation)
        y = check_output(backend, x, residual, out, layout, training)
        use_batch = training or running is None
        if use_batch and peers.size == 1 and layout.shape_3d[0] * layout.shape_3d[2] == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        tensor, target = backend.as_kernel_input(layout.as_3d(x)), backend.as_kernel_input(layout.as_3d(y))
        added = None if residual is None else backend.as_kernel_input(layout.as_3d(residual))
        if use_batch:
            vector, local = backend.statistics(tensor, call.trailer(peers))

    if use_batch:
        call.allreduce_checked(peers, vector)
        squares = None
        if dtype.itemsize == 8:  # once more, about the mean of all: float64 data show what one vector loses
            with call.preparing(peers, call.channels + 3, library):
                squares = backend.centered_squares(local, vector, call.trailer(peers))
            call.allreduce_checked(peers, squares)
        update = running if training else None
        normalization = backend.normalize(
            tensor, target, vector, squares, weight, bias, update, peers.size, eps, added, slope
        )
    else:
        assert running is not None
        normalization = backend.normalize_fixed(
            tensor, target, running.mean, running.var, weight, bias, eps, added, slope
        )
    if out is not None and not backend.overlaps(target, out):  # its strides allowed no 3-D view
        out[...] = layout.as_batch(target)
    saved = Saved(
        x=tensor,
        has_residual=residual is not None,
        layout=layout,
        normalization=normalization,
        weight_type=None if weight is None else weight.dtype,
        bias_type=None if bias is None else bias.dtype,
        constant_statistics=not use_batch,
        group=process_group,
        synchronized=training,
        call=call,
        input_kept=out is None or not backend.overlaps(out, x),
        sums=(vector, squares) if use_batch else None,
    )
    return (given if isinstance(given, np.ndarray) else y), saved  # an array of a subclass stays one


@np.errstate(all="ignore")
def sync_batch_norm_backward(dy: Array, saved: Saved, *, grad_reduction: str = "none") -> Gradients:
    """Compute the gradients of `sync_batch_norm`.

    With g the gradient behind the activation, and ``sum_dy = Σ g``, ``sum_dy_xmu = Σ g (x - mean)`` over
    all ranks: ``dx = (g - sum_dy/count - (x - mean) invstd² sum_dy_xmu/count) invstd weight``, and
    ``dx = g invstd weight`` where running statistics were used.

    Parameters
    ----------
    dy : array
        Gradient with respect to y: of its shape and type, in any memory order, of any library that `x` may
        be of.
    saved : Saved
        From the forward.
    grad_reduction : {"none", "sum", "mean"}
        Whether the gradients of weight and bias are this rank's (as in torch, for a data-parallel wrapper
        to average), or summed or averaged over the ranks. That takes no further message when training.

    Returns
    -------
    Gradients
        With respect to x and residual, in the memory order of x, and to weight and bias.

    Raises
    ------
    TypeError, ValueError
        If `dy` does not match y.
    RuntimeError
        If y was written over x.
    RemoteRankError
        If another rank found its input wrong.
    RankMismatchError
        If the ranks are in different calls.
    CollectiveTimeoutError
        If a rank does not come within the group's timeout.

    Notes
    -----
    **Collective** if the forward was. One allreduce of 16C + 24 bytes.
    """
    x, normalization, layout = saved.x, saved.normalization, saved.layout
    peers = as_group(saved.group) if saved.synchronized or grad_reduction != "none" else _LOCAL
    call = Call(saved.call.name, saved.call.channels, "backward", saved.call.number)
    with call.preparing(peers, 2 * call.channels + 3, module_of(x)):
        dy = as_array(dy)
        backend = backend_of(x)
        check_output_gradient(backend, dy, layout.shape, x.dtype)
        if not saved.input_kept:
            raise RuntimeError("backward needs the input, but the forward wrote its result over it (out=)")
        check_grad_reduction(grad_reduction)
        scale = 1 / peers.size if grad_reduction == "mean" else 1.0
        dtype = x.dtype.newbyteorder("=")
        dx = backend.empty(layout, dtype)
        dresidual = backend.empty(layout, dtype) if saved.has_residual else None
        residual = None if dresidual is None else layout.as_3d(dresidual)
        total, own, gradient = backend.reduce_gradients(
            backend.as_kernel_input(layout.as_3d(dy)), x, normalization, residual, call.trailer(peers)
        )

    call.allreduce_checked(peers, total)
    weight, bias = backend.input_gradient(
        gradient,
        x,
        normalization,
        layout.as_3d(dx),
        sums=None if saved.constant_statistics else total if saved.synchronized else own,
        parameter_sums=own if grad_reduction == "none" else total,
        parameter_scale=scale,
        weight_type=saved.weight_type,
        bias_type=saved.bias_type,
    )
    return Gradients(dx, weight, bias, dresidual)


_LOCAL = SingleProcessGroup()


def _call(x: Array, weight: Array | None, running_mean: Array | None, channels_last: bool) -> Call:
    """Return the call of a forward outside a layer."""
    # A rank with float64 data exchanges once more than others: by the name they find out before.
    dtype = getattr(x, "dtype", "")
    is_float64 = "float64" in str(getattr(dtype, "name", dtype))  # in any byte order, or of torch
    name = "sync_batch_norm in float64" if is_float64 else "sync_batch_norm"
    return Call(name, _channels(x, weight, running_mean, channels_last), "forward", 0)


def _library(*arrays: object) -> ModuleType:
    """Return the library whose arrays the other ranks exchange, whatever is wrong with this one's `x`."""
    libraries = [module_of(array) for array in arrays if array is not None]
    return next((library for library in libraries if library is not np), np)


def _channels(x: object, weight: Array | None, running_mean: Array | None, channels_last: bool) -> int:
    """Return the number of channels that the other ranks expect, whatever is wrong with this one's `x`."""
    for known in (weight, running_mean):
        if known is not None:
            return math.prod(known.shape if hasattr(known, "shape") else np.shape(known))
    shape: Sequence[int] = getattr(x, "shape", ())
    return int(shape[-1 if channels_last else 1]) if len(shape) > 1 else 0
