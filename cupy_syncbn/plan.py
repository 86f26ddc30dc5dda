"""Plans: all that depends only on the kind of input, checked once and found again by one look-up.

The kind of input is the shapes, types, strides and devices of the arrays, which of them are there, and the
settings. Some things can change from call to call, and are looked at in each: whether arrays are writeable,
and whether they overlap.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array, as_array, check_writeable, current_device
from cupy_syncbn.backends.interface import Backend, Running
from cupy_syncbn.backends.layout import Layout
from cupy_syncbn.checks import (
    Activation,
    Model,
    activation_slope,
    check_grad_reduction,
    check_gradient_out,
    check_inplace,
    check_input,
    check_layer,
    check_like,
    check_no_overlap,
    check_out,
    check_parameter,
    check_running,
    check_settings,
)

MOST_PLANS = 512
"""Kinds of input that are remembered; beyond them all are learnt anew."""
MOST_GRADIENTS = 16
"""Kinds of gradients that a plan remembers."""


class Arguments(NamedTuple):
    """The arrays of a forward beside x; None for those that are not there."""

    weight: Array | None = None
    bias: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None
    num_batches_tracked: Array | None = None
    residual: Array | None = None
    out: Array | None = None


_LAYER_ARRAYS = ("weight.data", "bias.data", "running_mean", "running_var")
"""The names that a layer's arrays have in it."""


class Settings(NamedTuple):
    """The settings of a forward; those from `frozen` to `bias_trains` are a layer's own."""

    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    channels_last: bool = False
    activation: Activation = None
    frozen: bool = False
    """Whether training leaves the running statistics as they are."""
    dimensions: tuple[int, ...] | None = None
    """The numbers of axes that a layer takes."""
    layer_type: np.dtype[Any] | None = None
    weight_trains: bool = True
    """Whether the backward computes the gradient of the weight, if there is one; so `bias_trains`."""
    bias_trains: bool = True
    inplace: bool = False


class Plan:
    """All that follows from a kind of input."""

    __slots__ = (
        "backend", "bias_type", "device", "dtype", "gradients", "has_residual", "has_squares", "inplace",
        "layout", "on_host", "slope", "training", "uses_batch", "weight_type",
    )  # fmt: skip

    def __init__(
        self, x: Array, arguments: Arguments, settings: Settings, backend: Backend, layout: Layout
    ) -> None:
        weight, bias, running_mean, *_ = arguments
        self.backend, self.layout = backend, layout
        self.on_host = isinstance(x, np.ndarray)
        self.device = None if self.on_host else current_device()
        """Of the input, and of the record that the backward takes."""
        self.dtype: np.dtype[Any] = x.dtype.newbyteorder("=")
        """The type of y and dx."""
        self.training = settings.training
        self.uses_batch = settings.training or running_mean is None
        """Whether the statistics are the batch's, and depend on x."""
        self.has_squares = self.uses_batch and self.dtype.itemsize == 8
        """Whether there is a second sum: float64 data show the error of a single one."""
        self.slope = activation_slope(settings.activation)
        self.inplace = settings.inplace
        self.has_residual = arguments.residual is not None
        self.weight_type = None if weight is None or not settings.weight_trains else weight.dtype
        """None if there is no gradient to compute; so `bias_type`."""
        self.bias_type = None if bias is None or not settings.bias_trains else bias.dtype
        self.gradients: set[Any] = set()
        """The kinds of dy, with reductions, that have been found right."""

    def model_of(self, name: str, shape: tuple[int, ...]) -> Model:
        """Return what an array is to be like that goes with the input or the output."""
        return Model(name, self.backend, "numpy" if self.on_host else "cupy", shape, self.dtype)

    def as_tensor(self, array: Array) -> Array:
        """Return a batch as (outer, C, inner), as the backend takes it."""
        return self.backend.as_kernel_input(self.layout.as_3d(array))


_plans: dict[Any, Plan] = {}

_BATCH_ON_HOST = attrgetter("__class__", "dtype", "shape", "strides")
_BATCH_ON_GPU = attrgetter("__class__", "dtype", "shape", "strides", "device.id")
# Of parameters and running statistics, whose strides do not matter.
_SMALL_ON_HOST = attrgetter("__class__", "dtype", "shape")
_SMALL_ON_GPU = attrgetter("__class__", "dtype", "shape", "device.id")


class Prepared(NamedTuple):
    """A forward whose arguments are right. The tensors are (outer, C, inner)."""

    plan: Plan
    x: Array
    y: Array
    residual: Array | None
    running: Running | None
    result: Array
    """y in the shape of the batch."""
    is_copy: bool
    """Whether y is to be copied to the result, whose strides allow no such view."""
    kept: Array | None
    """What the backward takes: x, or y of a forward in place; None if y was written over x otherwise."""


def prepare(x: Any, arguments: Arguments, settings: Settings, channels: int, alone: bool) -> Prepared:
    """Check the arguments of a forward, and make room for its result.

    `channels` is the number that the other ranks expect, `alone` tells that there are none.
    """
    layer_array = arguments.running_mean if arguments.weight is None else arguments.weight
    if settings.inplace:
        check_inplace(settings.activation, arguments.residual is not None, arguments.out, x)
        x = as_array(x, "x")
        arguments = arguments._replace(out=x)
    x, arguments = _converted(x, arguments, settings.frozen)
    kind, plan = _look_up(x, arguments, settings, channels, alone)
    if plan is None:
        if settings.layer_type is not None:
            check_layer(x, layer_array, settings.dimensions, settings.layer_type)
        plan = _checked(x, arguments, settings, channels, alone)
        _remember(kind, plan)
    _, _, mean, var, tracked, residual, out = arguments
    running = None
    if mean is not None and var is not None:
        running = Running(mean, var, tracked, settings.momentum)
        if settings.training and plan.on_host:
            is_writeable = mean.flags.writeable and var.flags.writeable
            if not (is_writeable and (tracked is None or tracked.flags.writeable)):
                check_writeable("running_mean", mean)
                check_writeable("running_var", var)
                check_writeable("num_batches_tracked", tracked)
    added = None if residual is None else plan.as_tensor(residual)
    if out is None:
        y = plan.backend.empty(plan.layout.shape_3d, plan.dtype)
        tensor = plan.as_tensor(x)
        return Prepared(plan, tensor, y, added, running, plan.layout.as_batch(y), False, tensor)
    check_out(plan.backend, out, x, residual, settings.training and not settings.inplace)
    tensor = plan.as_tensor(x)
    y = tensor if settings.inplace else plan.as_tensor(out)
    is_copy = not plan.backend.overlaps(y, out)
    kept = tensor if settings.inplace or not plan.backend.overlaps(out, x) else None
    return Prepared(plan, tensor, y, added, running, out, is_copy, kept)


def _converted(x: Any, arguments: Arguments, frozen: bool) -> tuple[Array, Arguments]:
    """Turn arrays of other libraries into arrays of NumPy or CuPy; leave out statistics that are frozen."""
    residual, out = arguments.residual, arguments.out
    if residual is not None or out is not None:
        in_place, out = out is x, as_array(out, host=False)
        if in_place and isinstance(out, np.ndarray):  # of a subclass, it would become two views
            x = out
        arguments = arguments._replace(residual=as_array(residual, "residual"), out=out)
    if frozen:
        arguments = arguments._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    return x if type(x) is np.ndarray else as_array(x, "x"), arguments


def _look_up(
    x: Array, arguments: Arguments, settings: Settings, channels: int, alone: bool
) -> tuple[Any, Plan | None]:
    """Return the kind of input and its plan: None if that is not known, and for both if there is no kind."""
    weight, bias, mean, var, tracked, residual, out = arguments
    is_on_host = type(x) is np.ndarray
    batch, small = (_BATCH_ON_HOST, _SMALL_ON_HOST) if is_on_host else (_BATCH_ON_GPU, _SMALL_ON_GPU)
    try:
        kind = (
            settings,
            channels,
            alone,
            batch(x),
            None if weight is None else small(weight),
            None if bias is None else small(bias),
            None if mean is None else small(mean),
            None if var is None else small(var),
            None if tracked is None else small(tracked),
            None if residual is None else batch(residual),
            None if out is None else batch(out),
            None if is_on_host else current_device(),
        )
        return kind, _plans.get(kind)
    except (AttributeError, KeyError, TypeError):  # of a list, or a setting without a hash: checks will tell
        return None, None


def _remember(kind: Any, plan: Plan) -> None:
    if kind is not None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[kind] = plan


def _checked(x: Any, arguments: Arguments, settings: Settings, channels: int, alone: bool) -> Plan:
    """Check the kinds of all arguments, and return the plan."""
    weight, bias, mean, var, tracked, residual, out = arguments
    check_settings(settings.eps, settings.momentum)
    backend, layout = check_input(x, settings.channels_last, channels, (weight, bias, mean, var))
    names = Arguments._fields if settings.layer_type is None else _LAYER_ARRAYS
    for name, values in zip(names, (weight, bias, mean, var), strict=False):
        if values is not None:
            check_parameter(backend, name, values, x, channels, settings.layer_type)
    check_running(backend, mean, var, tracked, settings.momentum)
    plan = Plan(x, arguments, settings, backend, layout)
    for name, array in (("residual", residual), ("out", out)):
        if array is not None:
            check_like(name, array, plan.model_of("input", x.shape))
    if out is not None:
        check_no_overlap("x" if settings.inplace else "out", out)
    if plan.uses_batch and alone and layout.shape_3d[0] * layout.shape_3d[2] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return plan


class PreparedGradient(NamedTuple):
    """A backward whose arguments are right. The tensors are (outer, C, inner)."""

    dy: Array
    dx: Array
    result: Array
    """dx in the shape of the batch."""
    is_copy: bool
    """Whether dx is to be copied to the result."""


def prepare_gradient(
    dy: Any, plan: Plan, grad_reduction: str, kept: Array, out: Array | None
) -> PreparedGradient:
    """Check the arguments of a backward, and make room for its result."""
    out_is_dy = out is dy
    if type(dy) is not np.ndarray:
        dy = as_array(dy, "dy")
    try:
        kind: Any = _BATCH_ON_HOST(dy) if plan.on_host else (_BATCH_ON_GPU(dy), current_device())
        is_known = (kind, grad_reduction) in plan.gradients
    except (AttributeError, TypeError):  # of a list, say: the checks below will tell
        is_known = False
    if not is_known:
        check_grad_reduction(grad_reduction)
        if plan.device is not None and current_device() != plan.device:
            raise ValueError(
                f"expected a backward on the device of its forward, {plan.device} (got {current_device()} as "
                f"the current device): work under `with cupy.cuda.Device({plan.device})`"
            )
        check_like("dy", dy, plan.model_of("output", plan.layout.shape))
        if len(plan.gradients) >= MOST_GRADIENTS:
            plan.gradients.clear()
        plan.gradients.add((kind, grad_reduction))
    tensor = plan.as_tensor(dy)
    if out is None:
        dx = plan.backend.empty(plan.layout.shape_3d, plan.dtype)
        return PreparedGradient(tensor, dx, plan.layout.as_batch(dx), False)
    out = dy if out_is_dy else as_array(out, host=False)
    check_like("out", out, plan.model_of("input", plan.layout.shape))
    check_no_overlap("out", out)
    check_gradient_out(plan.backend, out, dy, kept)
    dx = tensor if out_is_dy else plan.as_tensor(out)
    return PreparedGradient(tensor, dx, out, not plan.backend.overlaps(dx, out))
