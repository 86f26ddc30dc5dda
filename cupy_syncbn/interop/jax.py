"""Synchronized batch normalization for JAX, on the CPU: under jit and grad, with the statistics by MPI.

The running statistics are a state that goes in and comes out, as flax's ``batch_stats`` and equinox's states
do::

    y, state = sync_batch_norm(x, weight, bias, state)

Messages are sent by ordered callbacks, so that all ranks send theirs in the order of the program: XLA leaves
out, repeats and reorders only others. Each callback is one collective call, with a number by which ranks that
are out of step find out. Nothing is kept between callbacks: a backward gets all that it needs as arrays.
"""

from __future__ import annotations

import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback

from cupy_syncbn import functional
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue
from cupy_syncbn.checks import check_grad_reduction, check_settings
from cupy_syncbn.comm.call import DO, Call, Collective, commit
from cupy_syncbn.comm.groups import ProcessGroup, as_group
from cupy_syncbn.functional import Saved
from cupy_syncbn.interop.threads import check_threads
from cupy_syncbn.plan import Arguments, Settings, prepare

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["BatchNormState", "init_state", "sync_batch_norm"]


class BatchNormState(NamedTuple):
    """The running statistics of a layer.

    Parameters
    ----------
    mean, var : array of shape (C,)
        Running mean and variance.
    num_batches_tracked : int32 array of shape ()
        Counts the training batches that had any data.
    """

    mean: Array
    var: Array
    num_batches_tracked: Array


def init_state(num_features: int, dtype: Any = "float32") -> BatchNormState:
    """Return the running statistics of a layer that has seen no batch: mean 0, variance 1.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    dtype : data type
        That of weight and bias.

    Returns
    -------
    BatchNormState
        For `sync_batch_norm`.

    Examples
    --------
    >>> init_state(2).var.tolist()
    [1.0, 1.0]
    """
    return BatchNormState(
        jnp.zeros(num_features, dtype), jnp.ones(num_features, dtype), jnp.zeros((), "int32")
    )


class _Layer(NamedTuple):
    """What a call does not differentiate by."""

    group: ProcessGroup
    momentum: float | None
    eps: float
    channels_last: bool
    grad_reduction: str
    name: str


def sync_batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    state: BatchNormState | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | MPI.Intracomm | None = None,
    channels_last: bool = False,
    grad_reduction: str = "none",
    name: str = "sync_batch_norm",
) -> tuple[Array, BatchNormState | None]:
    """Normalize a batch by the mean and variance of each channel over all ranks.

    Parameters
    ----------
    x : array of shape (N, C, ...), or (N, ..., C) if `channels_last`
        This rank's part of the batch; N may differ between ranks and be 0.
    weight, bias : array of shape (C,), optional
        Scale and offset.
    state : BatchNormState, optional
        Running statistics, which evaluation uses; without them it uses those of this rank's batch.
    training : bool
        Normalize by the statistics of the batch, over all ranks.
    momentum : float or None
        Share of the batch in the new running statistics, as in torch (flax has that of the old ones); None
        averages over all batches.
    eps : float
        Added to the variance.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all.
    channels_last : bool
        Whether the channels are the last axis of `x`.
    grad_reduction : {"none", "sum", "mean"}
        Whether the gradients of weight and bias are this rank's, for the program to add up, or their sum or
        mean over the ranks.
    name : str
        The layer's name in errors, the same on all ranks.

    Returns
    -------
    y : array like `x`
        The result. Apply an activation to it: XLA fuses it with what follows.
    state : BatchNormState or None
        The new running statistics; no gradient comes through them.

    Raises
    ------
    TypeError, ValueError
        If a setting is wrong.
    RuntimeError
        If MPI does not grant MPI_THREAD_MULTIPLE, or JAX has a single thread (see below).
    jax.errors.JaxRuntimeError
        If the arrays are wrong or another rank has failed, when the result is used. It shows the error of
        the package, such as RemoteRankError.

    Notes
    -----
    **Collective** when training, and so is the gradient: every rank runs the same program. jit, grad, scan
    and while_loop keep the order of the messages. vmap, checkpoint (remat) and second derivatives are errors.
    Do not call it in pmap or shard_map over several devices of one process, each of which would send. Let
    jax.block_until_ready end a step before the program itself exchanges messages by the same group.

    JAX runs callbacks in threads of its own, and copies their arguments in others. Where a process has one
    core, importing this module asks JAX for two CPU devices, whose second thread copies; if JAX has started
    before, set ``jax.config.update("jax_num_cpu_devices", 2)`` at the start.

    Evaluation sends no messages, and has no callback: XLA compiles all of it.

    Examples
    --------
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, state = jax.jit(sync_batch_norm)(x, state=init_state(2))
    >>> y.round(3).tolist(), state.num_batches_tracked.tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], 1)
    """
    check_settings(eps, momentum)
    check_grad_reduction(grad_reduction)
    x = jnp.asarray(x)
    if not training:
        return _evaluate(x, weight, bias, state, eps, channels_last), state
    group = as_group(process_group)
    check_threads(group, "MULTIPLE", "JAX calls MPI from a thread of its own")
    _check_cores()
    layer = _Layer(group, momentum, eps, channels_last, grad_reduction, name)
    y, *new = _normalize(layer, x, weight, bias, state)
    return y, BatchNormState(*new) if new else None


def _evaluate(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    state: BatchNormState | None,
    eps: float,
    channels_last: bool,
) -> Array:
    """Return y by the running statistics, or by those of this batch, in what XLA compiles."""
    channel = x.ndim - 1 if channels_last else 1
    others = tuple(axis for axis in range(x.ndim) if axis != channel)
    values = x.astype(jnp.promote_types(x.dtype, "float32"))

    def column(array: Array) -> Array:
        return jnp.expand_dims(array.astype(values.dtype), others)

    if state is None:
        mean, var = values.mean(others), values.var(others)
    else:
        mean, var = state.mean, state.var
    y = (values - column(mean)) * jax.lax.rsqrt(column(var) + eps)
    y = y if weight is None else y * column(weight)
    y = y if bias is None else y + column(bias)
    return y.astype(x.dtype)


# ---- Training ----
_shape: Any = jax.ShapeDtypeStruct
_config: Any = jax.config


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    layer: _Layer, x: Array, weight: Array | None, bias: Array | None, state: BatchNormState | None
) -> list[Array]:
    """Return [y, *new state]."""
    results, _ = _forward(layer, x, weight, bias, state)
    return results


def _forward(
    layer: _Layer, x: Array, weight: Array | None, bias: Array | None, state: BatchNormState | None
) -> tuple[list[Array], Any]:
    """Return [y, *new state], and what the backward needs."""
    C = x.shape[-1 if layer.channels_last else 1] if x.ndim > 1 else 0
    shapes = [x, *(() if state is None else state)]
    length, squares = functional.describe_forward(Call("", C, "", 0), layer.group, ())[2], 0
    if x.dtype == jnp.float64:
        squares = length - 3 * C - 1
    words = [_shape((2 * each,), "uint32") for each in (length, squares)]
    number = _shape((), "uint32")
    *results, sums, squared, call = _on_host(
        functools.partial(_forward_on_host, layer), [*shapes, *words, number], x, weight, bias, state
    )
    return results, (x, weight, bias, sums, squared, call)


def _backward(layer: _Layer, residuals: Any, cotangents: list[Array]) -> tuple[Any, ...]:
    """Return the gradients of x, weight and bias; the state has none."""
    x, weight, bias, *_ = residuals
    wanted = [each for each in (x, weight, bias) if each is not None]
    results = iter(_on_host(functools.partial(_backward_on_host, layer), wanted, *residuals, cotangents[0]))
    return *(None if each is None else next(results) for each in (x, weight, bias)), None


_normalize.defvjp(_forward, _backward)


def _on_host(function: Callable[..., list[Any]], results: list[Any], *arguments: Any) -> list[Array]:
    """Call a function of NumPy arrays from compiled code, in the order of the program."""
    shapes = [_shape(each.shape, each.dtype) for each in results]

    def called(*arguments: Any) -> list[Any]:
        # In NumPy alone: JAX's own functions could wait for the thread that this runs in.
        return function(*jax.tree.map(np.asarray, arguments))

    found: list[Array] = io_callback(called, shapes, *arguments, ordered=True)
    return found


_calls: weakref.WeakKeyDictionary[ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()


def _call_of(layer: _Layer, x: Any, number: int) -> Call:
    """Return the call of a forward, whose name tells its settings."""
    name = (
        f"{layer.name} with eps={layer.eps}, momentum={layer.momentum}, "
        f"grad_reduction={layer.grad_reduction}{', in float64' * (x.dtype == np.float64)}"
    )
    channels = x.shape[-1 if layer.channels_last else 1] if x.ndim > 1 else 0
    return Call(name, channels, "forward", number)


def _forward_on_host(layer: _Layer, x: Any, weight: Any, bias: Any, state: Any) -> list[Any]:
    """Return y, the new state, the sums as words of 32 bits, and the number of the call."""
    number = next(_calls.setdefault(layer.group, itertools.count()))

    def describe() -> functional.Description:
        return functional.describe_forward(_call_of(layer, x, number), layer.group, (x,))

    with Collective(describe=describe) as step:
        step.enter(*describe())
        running: list[Any] = [None] * 3
        if state is not None:
            running = [state.mean.copy(), state.var.copy(), np.array(state.num_batches_tracked, "int64")]
        settings = Settings(True, layer.momentum, layer.eps, layer.channels_last)
        y, saved, writes = functional.forward(
            x, Arguments(weight, bias, *running), settings, layer.group, step
        )
        commit(map(DO, writes))
    new = [] if state is None else [*running[:2], running[2].astype("int32")]
    batch: Any = saved.batch
    squares = np.empty(0) if batch.squares is None else batch.squares
    return [np.ascontiguousarray(y), *new, batch.vector.view("u4"), squares.view("u4"), np.uint32(number)]


def _backward_on_host(
    layer: _Layer, x: Any, weight: Any, bias: Any, sums: Any, squares: Any, number: Any, dy: Any
) -> list[Any]:
    """Return the gradients of x, weight and bias, without what is None."""
    call = _call_of(layer, x, int(number))
    backward_call = call._replace(direction="backward")
    length = functional.describe_forward(call, layer.group, ())[2] - 2 * call.channels - 1
    description = backward_call, layer.group, length, (x,)
    with Collective(describe=lambda: description) as step:
        step.enter(*description)
        settings = Settings(True, layer.momentum, layer.eps, layer.channels_last)
        plan, x, *_ = prepare(x, Arguments(weight, bias), settings, call.channels, layer.group.size == 1)
        # The step of the forward follows from its sums: without data it is made anew, and without messages.
        batch = BatchSums(sums.view("f8"), squares.view("f8") if squares.size else None, layer.group.size)
        nothing, affine = x[:0], Affine(weight, bias, layer.eps)
        normalization, _ = plan.backend.normalize(nothing, nothing.copy(), batch, None, affine, Epilogue())
        saved = Saved(plan, x, normalization, layer.group, layer.group, call, None, batch, description)
        gradients = functional.backward(dy, saved, layer.grad_reduction, step)
    found = gradients.x, gradients.weight, gradients.bias
    return [np.ascontiguousarray(each) for each in found if each is not None]


# ---- Threads ----
def _cores() -> int:
    """Return the number of cores that this process may use, by which JAX makes threads."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return count or 1


def _start_with_two_threads() -> None:
    """Let a second CPU device bring JAX a second thread, if it has not started."""
    if _cores() == 1 and _config.jax_num_cpu_devices == -1:
        try:
            _config.update("jax_num_cpu_devices", 2)
        except RuntimeError:  # it has started: `_check_cores` tells, if it matters
            return


def _check_cores() -> None:
    """Raise RuntimeError if a callback would wait for ever for the thread that it runs in."""
    if _cores() == 1 and jax.local_device_count("cpu") == 1:
        raise RuntimeError(
            "JAX has a single thread, in which a callback would wait for its own arguments: call "
            'jax.config.update("jax_num_cpu_devices", 2) at the start of the program, or import '
            "cupy_syncbn.interop.jax before JAX makes its first array"
        )


_start_with_two_threads()
