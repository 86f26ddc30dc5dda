"""The algorithm: prepare, statistics, sum over the ranks, normalize; forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums
from cupy_syncbn.checks import Activation
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.call import DO, Call, Collective, commit
from cupy_syncbn.comm.groups import SINGLE, ProcessGroup, as_group
from cupy_syncbn.plan import Arguments, Plan, Settings, prepare, prepare_gradient

if TYPE_CHECKING:
    from mpi4py import MPI


Description: TypeAlias = tuple[Call, ProcessGroup, int, tuple[Any, ...]]
"""What `Collective` needs to know: the call, the group, and the length and the arrays of its sum."""


@dataclass(slots=True, repr=False)
class Saved:
    """The record of a forward, for its backward. `x` is kept as it is, not copied."""

    plan: Plan
    x: Array | None
    """(outer, C, inner), see `Layout`; of a forward in place y; None if y was written over it otherwise."""
    normalization: Any
    """The backend's record of its step at each element."""
    group: ProcessGroup | MPI.Intracomm | None
    peers: ProcessGroup
    """The ranks whose batches were one: in evaluation this one alone."""
    call: Call
    sample: bytes | None
    """Some of y, of a forward in place on a CPU: to notice if it is changed before the backward."""
    batch: BatchSums | None
    """The sums over all ranks; None with running statistics."""
    backward: Description
    """The description of a backward over these ranks."""


class Gradients(NamedTuple):
    """Gradients with respect to the arguments of `sync_batch_norm`; None for those not given.

    Parameters
    ----------
    x : array
        With the shape, type and memory order of the argument.
    weight, bias : array of shape (C,)
        This rank's gradient, or the sum or mean over the ranks, by `grad_reduction`.
    residual : array
        As `x`.
    """

    x: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


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
    inplace: bool = False,
    call: Call | None = None,
) -> tuple[Array, Saved]:
    """Normalize a batch by the mean and variance of each channel over all ranks.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` (Ioffe and Szegedy 2015).

    Parameters
    ----------
    x : array of shape (N, C, ...), or (N, ..., C) if `channels_last`
        This rank's part of the batch, of type float16, bfloat16, float32 or float64; N may differ between
        ranks and be 0. A transposed view is computed in its memory order, without a copy. An array of NumPy
        or CuPy, or one that shares its memory with them: a torch tensor, a JAX array, any object with
        DLPack or ``__array__``. A torch tensor that requires grad is an error where torch keeps a graph.
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
        they are the average over all batches. With 1 they are the mean and the unbiased variance of this
        batch, over all ranks. The running variance takes the unbiased variance.
    eps : float
        Added to the variance; at least 0, which makes y of a constant channel NaN.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all.
    channels_last : bool
        Whether the channels are the last axis of `x`.
    activation : {None, "relu", "leaky_relu"} or ("leaky_relu", slope)
        Applied to the result.
    residual : array like `x`, optional
        Added before the activation.
    out : array like `x`, optional
        The array to write y to, of NumPy or on the GPU. It must not overlap `x`, which the backward needs,
        or `residual`; but without training it may be `x`, if no backward follows.
    inplace : bool
        Write y over `x`, and find x from y in the backward: half the memory (Rota Bulò, Porzi and
        Kontschieder 2018). Leave y unchanged until the backward; on a CPU it raises RuntimeError where it
        notices a change. `activation` is None or leaky ReLU with a slope of at least 0.001, there is no
        `residual`, and `x` is an array that may be written to. See the notes.
    call : Call, optional
        The name of this call in errors, by which ranks compare their calls; layers give theirs.

    Returns
    -------
    y : array like `x`
        The result, in the memory order of `x`: of NumPy, or of CuPy on a GPU.
    saved : Saved
        For `sync_batch_norm_backward`. It refers to `x`: leave that unchanged until then. With an activation
        it also holds one bit per element.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong. Nothing has changed, and the other ranks raise RemoteRankError.
    RemoteRankError
        If another rank found its input wrong.
    RankMismatchError
        If the ranks are in different calls.
    CollectiveTimeoutError
        If a rank does not come within the group's timeout.

    Notes
    -----
    **Collective** when training: every rank of the group must call it. One allreduce of 32C + 48 bytes; for
    float64 data a second, of 8C + 40.

    **In place** a weight below 1e-5 in magnitude counts as 1e-5 with its sign, in y too, as y would tell
    nothing of x otherwise; its gradient is that at this value. The rounding of y is multiplied on the way
    back: the errors of the gradients are those of the ordinary forward times about
    ``1 + |bias / weight|``, and in 16-bit types x has the precision of y.

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

    def describe() -> Description:
        arrays = (x, weight, bias, running_mean, running_var, residual)
        peers = as_group(process_group) if training else SINGLE
        return describe_forward(call or _call(x, (weight, running_mean), channels_last), peers, arrays)

    with Collective(describe=describe) as step:
        step.enter(*describe())
        arguments = Arguments(weight, bias, running_mean, running_var, num_batches_tracked, residual, out)
        settings = Settings(training, momentum, eps, channels_last, activation, inplace=inplace)
        result = forward(x, arguments, settings, process_group, step)
        commit(map(DO, result.writes))
    return result.y, result.saved


class Forward(NamedTuple):
    """The result of a forward, and what is still to be written: the running statistics."""

    y: Array
    saved: Saved
    writes: list[Callable[[], object]]


def describe_forward(call: Call, peers: ProcessGroup, arrays: tuple[Any, ...]) -> Description:
    """Return what `Collective` needs to know of a forward."""
    return call, peers, 4 * call.channels + 1 + trailer.LENGTH, arrays


@np.errstate(all="ignore")  # infinities and NaN are the data's, and pass through
def forward(
    x: Any,
    arguments: Arguments,
    settings: Settings,
    group: ProcessGroup | MPI.Intracomm | None,
    step: Collective,
) -> Forward:
    """See `sync_batch_norm`; the shapes are those of one rank's tensors and of the vectors."""
    call, peers = step.call, step.group
    given = x if settings.inplace else arguments.out
    plan, x, y, residual, running, result, is_copy, kept = prepare(
        x, arguments, settings, call.channels, peers.size == 1
    )  # (N, C, *spatial) -> (outer, C, inner)
    backend, batch = plan.backend, None
    if plan.uses_batch:
        step.needed += plan.has_squares
        vector, local_sums = backend.statistics(x, call.trailer(peers))  # -> (4C + 1 + trailer,)
        mailbox = step.sum(vector, kernel_follows=True)
        squares = None
        if plan.has_squares:  # once more, about the mean of all ranks
            step.expect(call.channels + trailer.LENGTH)
            squares = backend.centered_squares(
                local_sums, vector, step.trailer(), mailbox
            )  # -> (C + trailer,)
            mailbox = step.sum(squares, kernel_follows=True)
        batch = BatchSums(vector, squares, peers.size, mailbox)

    affine = Affine(arguments.weight, arguments.bias, settings.eps)
    length = 2 * call.channels + trailer.LENGTH
    backward_call = Call(call.name, call.channels, "backward", call.number, call.model)
    description = backward_call, peers, length, (x,)
    saved = Saved(plan, kept, None, group, peers, call, None, batch, description)
    saved.normalization, writes = backend.normalize(
        x, y, batch, running, affine, Epilogue(residual, plan.slope, plan.inplace)
    )
    if plan.inplace and plan.on_host:
        saved.sample = _sample(y)
    if is_copy:
        result[...] = plan.layout.as_batch(y)
    # An array of a subclass stays one.
    return Forward(given if isinstance(given, np.ndarray) else result, saved, writes)


def _sample(y: Array) -> bytes:
    """Return some 64 values, spread over an array."""
    sample: bytes = y.flat[:: y.size // 64 | 1].tobytes()
    return sample


def sync_batch_norm_backward(
    dy: Array, saved: Saved, *, grad_reduction: str = "none", out: Array | None = None
) -> Gradients:
    """Compute the gradients of `sync_batch_norm`.

    With g the gradient of the activation's input, and ``sum_dy = Σ g``, ``sum_dy_xmu = Σ g (x - mean)`` over
    all ranks: ``dx = (g - sum_dy/count - (x - mean) invstd² sum_dy_xmu/count) invstd weight``, and
    ``dx = g invstd weight`` where running statistics were used.

    Parameters
    ----------
    dy : array
        Gradient with respect to y: of its shape and type, in any memory order and of any library, as `x`.
    saved : Saved
        From the forward.
    grad_reduction : {"none", "sum", "mean"}
        Whether the gradients of weight and bias are this rank's (as in torch, for a data-parallel wrapper
        to average), or summed or averaged over the ranks. That takes no further message when training.
    out : array like `x`, optional
        The array to write dx to. It may be `dy`; it must not overlap what the forward has kept.

    Returns
    -------
    Gradients
        With respect to x and residual, in the memory order of x, and to weight and bias.

    Raises
    ------
    TypeError, ValueError
        If `dy` does not match y.
    RuntimeError
        If y was written over x by ``out=``, or was changed after a forward in place.
    RemoteRankError, RankMismatchError, CollectiveTimeoutError
        As of `sync_batch_norm`.

    Notes
    -----
    **Collective** if the forward was. One allreduce of 16C + 40 bytes.
    """
    with Collective(describe=lambda: describe_backward(saved, grad_reduction)) as step:
        step.enter(*describe_backward(saved, grad_reduction))
        return backward(dy, saved, grad_reduction, step, out)


def describe_backward(saved: Saved, grad_reduction: str) -> Description:
    """Return what `Collective` needs to know of a backward."""
    call, peers, length, arrays = saved.backward
    if grad_reduction != "none" and not saved.plan.training:
        peers = as_group(saved.group)
    return call, peers, length, arrays


@np.errstate(all="ignore")
def backward(
    dy: Any, saved: Saved, grad_reduction: str, step: Collective, out: Array | None = None
) -> Gradients:
    """See `sync_batch_norm_backward`."""
    plan, normalization, peers = saved.plan, saved.normalization, step.group
    backend, layout, x = plan.backend, plan.layout, _kept(saved)
    dy, dx, result, is_copy = prepare_gradient(
        dy, plan, grad_reduction, x, out
    )  # (N, C, *spatial) -> (outer, C, inner)
    dresidual = backend.empty(layout.shape_3d, plan.dtype) if plan.has_residual else None
    global_sums, local_sums, gradient = backend.reduce_gradients(
        dy, x, normalization, dresidual, step.call.trailer(peers)
    )  # -> (2C + trailer,)

    mailbox = step.sum(global_sums, kernel_follows=True) if plan.training else 0
    is_reduced = grad_reduction != "none"
    scale = 1 / peers.size if grad_reduction == "mean" else 1.0
    sums = global_sums if plan.training else None if saved.batch is None else local_sums
    if plan.training or not is_reduced:
        vector = global_sums if is_reduced else local_sums
        parameters = ParameterSums(vector, scale, plan.weight_type, plan.bias_type)
        weight, bias = backend.input_gradient(gradient, x, normalization, dx, sums, parameters, mailbox)
    else:  # each rank's statistics are its own, and so are the factors of its gradients
        parameters = ParameterSums(local_sums, 1.0, _summed(plan.weight_type), _summed(plan.bias_type))
        weight, bias = backend.input_gradient(gradient, x, normalization, dx, sums, parameters, mailbox)
        weight, bias = _sum_parameters(global_sums, weight, bias, scale, plan, step)
    if is_copy:
        result[...] = layout.as_batch(dx)
    return Gradients(result, weight, bias, None if dresidual is None else layout.as_batch(dresidual))


def _kept(saved: Saved) -> Array:
    """Return what the backward takes for x, or raise RuntimeError if it is not there any more."""
    if saved.x is None:
        raise RuntimeError(
            "backward needs the input, but the forward wrote its result over it (out=): call it without "
            "out, or with inplace=True"
        )
    if saved.sample is not None and _sample(saved.x) != saved.sample:
        raise RuntimeError(
            "backward finds x from y, as the forward was in place, but y was changed since: change a copy of "
            "y, or use inplace=False"
        )
    return saved.x


def _summed(dtype: np.dtype[Any] | None) -> np.dtype[Any] | None:
    """Return the type of a rank's gradient before it is added up: not of 16 bits."""
    return np.dtype(np.float32) if dtype is not None and dtype.itemsize == 2 else dtype


def _sum_parameters(
    vector: Array, weight: Array | None, bias: Array | None, scale: float, plan: Plan, step: Collective
) -> tuple[Array | None, Array | None]:
    """Return the gradients of weight and bias added up over the ranks, in a vector that has its trailer."""
    C = step.call.channels
    bias_sum, weight_sum = vector[:C], vector[C : 2 * C]
    if weight is not None:
        weight_sum[...] = weight
    if bias is not None:
        bias_sum[...] = bias
    step.sum(vector)
    return (
        None if weight is None else (weight_sum * scale).astype(plan.weight_type),
        None if bias is None else (bias_sum * scale).astype(plan.bias_type),
    )


def _call(x: Any, known: tuple[Array | None, ...], channels_last: bool) -> Call:
    """Return the call of a forward outside a layer, of which some (C,) arrays may be known."""
    # A rank with float64 data adds up once more than others: by the name they find out before.
    dtype = getattr(x, "dtype", "")
    is_float64 = "float64" in str(getattr(dtype, "name", dtype))  # in any byte order, or of torch
    name = "sync_batch_norm in float64" if is_float64 else "sync_batch_norm"
    return Call(name, _channels(x, known, channels_last), "forward", 0)


def _channels(x: Any, known: tuple[Array | None, ...], channels_last: bool) -> int:
    """Return the number of channels that the other ranks expect, whatever is wrong with this one's `x`."""
    for values in known:
        if values is not None:
            return math.prod(values.shape if hasattr(values, "shape") else np.shape(values))
    shape: Sequence[int] = getattr(x, "shape", ())
    return int(shape[-1 if channels_last else 1]) if len(shape) > 1 else 0
