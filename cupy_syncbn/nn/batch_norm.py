"""The layers: SyncBatchNorm, BatchNorm1d, 2d and 3d, and turning the latter into the former."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, Unpack

import numpy as np

from cupy_syncbn import functional
from cupy_syncbn.arrays import Array, array_module, is_cupy, module_of
from cupy_syncbn.checks import (
    Activation,
    activation_slope,
    check_grad_reduction,
    check_inplace,
    check_settings,
    data_type,
    number_of_channels,
)
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.call import DO, Call, Collective, commit
from cupy_syncbn.comm.groups import SINGLE, ProcessGroup, as_group
from cupy_syncbn.functional import Description, Saved
from cupy_syncbn.nn.conversion import OPAQUE, check_reach, layers_within, losses, nothing_found
from cupy_syncbn.nn.module import Module
from cupy_syncbn.nn.parameter import Parameter, accumulation, check_gradient
from cupy_syncbn.nn.records import NO_FORWARD, NOTHING, Waiting
from cupy_syncbn.nn.replace import replace_within
from cupy_syncbn.plan import Arguments, Settings

if TYPE_CHECKING:
    from mpi4py import MPI


_ATTRIBUTES = (
    "_calls_made", "_group", "_introduced", "_model", "activation", "affine", "bias", "channels_last",
    "dtype", "eps", "grad_reduction", "inplace", "momentum", "name", "num_features", "track_running_stats",
    "weight", "_frozen", "_no_backward", "_observe", "_waiting",
)  # fmt: skip
"""Attributes of each layer. A forward leaves its record there alone; a subclass may add others."""

_NEEDED = (
    "num_features", "eps", "momentum", "affine", "track_running_stats", "weight", "bias", "running_mean",
    "running_var", "num_batches_tracked",
)  # fmt: skip
"""Attributes without which a pickle is no layer."""


class BatchNormBase(Module):
    """The common part of all batch normalizations: parameters, running statistics, forward and backward."""

    _buffer_names = ("running_mean", "running_var", "num_batches_tracked")
    _parameter_names = ("weight", "bias")
    _dimensions: ClassVar[tuple[int, ...] | None] = None
    _never_left = Module._never_left.union(_ATTRIBUTES)
    _transient = ("_frozen", "_no_backward", "_observe", "_tree", "_waiting")

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: Array | None
    # What a pickle of an older version may lack has its value here.
    channels_last: bool = False
    activation: Activation = None
    grad_reduction: str = "none"
    name: str | None = None
    inplace: bool = False
    _group: ProcessGroup | None = None
    _calls_made: int = 0
    _introduced: bool = False
    _model: int | None = None
    """See `Call`."""
    _waiting: Waiting = NOTHING
    """The records of the forwards that wait for their backward."""
    _no_backward: int = 0
    """How many `no_backward` the layer is in."""
    _frozen: int = 0
    """How many `frozen_statistics` the layer is in."""
    _observe: Callable[[Saved], None] | None = None
    """Is shown each forward; see `recalibrate`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | MPI.Intracomm | None = None,
        *,
        dtype: Any = "float32",
        device: str | None = None,
        channels_last: bool = False,
        activation: Activation = None,
        grad_reduction: str = "none",
        name: str | None = None,
        bias: bool = True,
        inplace: bool = False,
    ) -> None:
        self.num_features = number_of_channels(num_features)
        check_settings(eps, momentum)
        check_grad_reduction(grad_reduction)
        activation_slope(activation)
        if inplace:
            check_inplace(activation, False, None, None)
        self.inplace = inplace
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.channels_last, self.activation = channels_last, activation
        self.grad_reduction, self.name = grad_reduction, name
        xp, shape, dtype = array_module(device), (self.num_features,), data_type(dtype)
        self.weight = Parameter(xp.ones(shape, dtype)) if affine else None
        self.bias = Parameter(xp.zeros(shape, dtype)) if affine and bias else None
        self.running_mean = xp.zeros(shape, dtype) if track_running_stats else None
        self.running_var = xp.ones(shape, dtype) if track_running_stats else None
        self.num_batches_tracked = xp.zeros((), np.int64) if track_running_stats else None
        self.dtype = dtype
        # None stays None: the world is known at the first sum, not at import.
        self._group = None if process_group is None else as_group(process_group)
        restart_of(self, name=self.name, model=None)()

    def forward(self, x: Array, residual: Array | None = None, out: Array | None = None) -> Array:
        """Normalize a batch; see `sync_batch_norm` for the arguments, the result and the errors.

        **Collective** over the ranks of a SyncBatchNorm in training mode. The first call sends one more
        message, of 40 bytes.
        """
        with Collective(describe=partial(self._describe_forward, x, residual)) as step:
            training = self.training
            if training and not self._introduced:
                self._introduce(step)
            step.enter(*self._describe_forward(x, residual))
            weight, bias = self.weight, self.bias
            arguments = Arguments(
                None if weight is None else weight.data,
                None if bias is None else bias.data,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                residual,
                out,
            )
            settings = Settings(
                training,
                self.momentum,
                self.eps,
                self.channels_last,
                self.activation,
                training and (self._frozen > 0 or not self.track_running_stats),
                self._dimensions,
                self.dtype,
                weight is None or weight.requires_grad,
                bias is None or bias.requires_grad,
                self.inplace,
            )
            y, saved, writes = functional.forward(x, arguments, settings, self._group, step)
            waiting = self._waiting if self._no_backward else self._waiting.after(saved)
            own = partial(vars(self).update, _waiting=waiting, _calls_made=self._calls_made + training)
            shown = [] if self._observe is None else [partial(self._observe, saved)]
            commit(map(DO, [*writes, own, *shown]))
            return y

    if TYPE_CHECKING:  # so that `y = bn(x)` has a type

        def __call__(self, x: Array, residual: Array | None = None, out: Array | None = None) -> Array:
            """See `forward`."""

    def _introduce(self, step: Collective) -> None:
        """Compare name, channels, type and settings between the ranks, before vectors of them meet."""
        own, model = self.name or type(self).__name__, f" of model {self._model}" if self._model else ""
        name = (
            f"the first call of {own} ({self.num_features} channels){model}, "
            f"with {self.dtype} parameters, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, tracking={self.track_running_stats}, activation={self.activation}, "
            f"grad_reduction={self.grad_reduction}, channels_last={self.channels_last}"
            f"{', inplace' if self.inplace else ''}"
        )
        for attribute, parameter in ("weight", self.weight), ("bias", self.bias):
            if self.affine and parameter is None:
                name += f", {attribute}=None"
            elif parameter is not None and not parameter.requires_grad:
                name += f", {attribute}.requires_grad=False"
        call = Call(name, self.num_features, "", self._calls_made, self._model)
        step.enter(call, as_group(self._group), trailer.LENGTH)
        step.needed = 2  # of which the forward is the second
        step.sum(np.array(step.trailer()))
        self._introduced = True

    def _call(self, direction: str) -> Call:
        name = self.name or type(self).__name__
        return Call(name, self.num_features, direction, self._calls_made, self._model)

    def _describe_forward(self, *arrays: Any) -> Description:
        peers = as_group(self._group) if self.training else SINGLE
        return functional.describe_forward(self._call("forward"), peers, (*arrays, self.running_mean))

    def backward(self, dy: Array, out: Array | None = None) -> Array | tuple[Array, Array]:
        """Compute the gradient of the input of the forward that waits; see `sync_batch_norm_backward`.

        It adds the gradients of weight and bias to their ``grad``, and returns dx, or (dx, dresidual) if the
        forward was given a residual. It raises RuntimeError if no forward waits, or if another forward has
        come between: see `take_record`, `no_backward` and `forget`. If one forward in training mode and one
        in evaluation mode wait, a layer in training mode takes the former. After an error about `dy` or
        ``grad`` the backward can be called again. `out` is where to write dx: an array like the input, or
        `dy` itself.

        **Collective** over the ranks of a SyncBatchNorm, if its forward was, or if `grad_reduction` is not
        "none".
        """
        with Collective(describe=partial(self._describe_backward, dy)) as step:
            saved, evaluation, lost = waiting = self._waiting
            if saved is NO_FORWARD or evaluation is not NO_FORWARD or lost:
                saved = waiting.choose(self.training, self.name or type(self).__name__)
            parameters = self.weight, self.bias
            if saved.plan.training or self.grad_reduction == "none":
                step.enter(*saved.backward)
            else:
                step.enter(*self._describe_backward(dy))
            for name, parameter in zip(("weight", "bias"), parameters, strict=True):
                if parameter is not None and parameter.grad is not None:
                    check_gradient(name, parameter)
            gradients = functional.backward(dy, saved, self.grad_reduction, step, out)
            writes = []
            for parameter, gradient in zip(parameters, (gradients.weight, gradients.bias), strict=True):
                if parameter is not None and gradient is not None and parameter.requires_grad:
                    writes.append(accumulation(parameter, gradient))
            # A rank that fails after the sum has another number than the others, and they find out.
            calls = self._calls_made + (saved.plan.training or self.grad_reduction != "none")
            result = gradients.x if gradients.residual is None else (gradients.x, gradients.residual)
            left = NOTHING if evaluation is NO_FORWARD else waiting.without(saved)
            own = partial(vars(self).update, _waiting=left, _calls_made=calls)
            commit(map(DO, [*writes, own]))
            return result

    def _describe_backward(self, dy: Any) -> Description:
        waiting = self._waiting
        saved = waiting.evaluation if waiting.training is NO_FORWARD else waiting.training
        if saved is not NO_FORWARD:
            return functional.describe_backward(saved, self.grad_reduction)
        is_collective = self.training or self.grad_reduction != "none"
        peers = as_group(self._group) if is_collective else SINGLE
        weight = None if self.weight is None else self.weight.data
        length = 2 * self.num_features + trailer.LENGTH
        return self._call("backward"), peers, length, (dy, weight, self.running_mean)

    def _is_waiting(self) -> bool | None:
        return self._waiting.last() is not NO_FORWARD

    def _forget(self) -> None:
        self._waiting = NOTHING

    def _take_left(self) -> Any:
        saved = self._waiting.last()
        is_training = saved is self._waiting.training
        self._waiting = self._waiting._replace(evaluation=NO_FORWARD) if not is_training else NOTHING
        return Waiting(saved) if is_training else Waiting(evaluation=saved), super()._take_left()

    def _swap_left(self, left: Any) -> Any:
        waiting, self._waiting = self._waiting, left[0]
        return waiting, super()._swap_left(left[1])

    def _set_aside(self) -> Callable[[], object]:
        put_back_rest = super()._set_aside()  # of a subclass, which may leave something of its own
        self._no_backward += 1

        def put_back() -> None:
            self._no_backward -= 1
            put_back_rest()

        return put_back

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks whose batches are one; None is all."""
        return self._group

    def __setstate__(self, state: Any) -> None:
        """Take the state of a copy or pickle; RuntimeError if it is one of a version that kept less."""
        attributes, slots = state if isinstance(state, tuple) else (state, {})
        missing = [name for name in _NEEDED if name not in attributes]
        if missing:
            raise RuntimeError(
                f"expected a pickle of {type(self).__name__} with {', '.join(_NEEDED)} (got one without "
                f"{', '.join(missing)}, of another version): load its state_dict() into a new layer"
            )
        vars(self).update(attributes)
        for name, value in (slots or {}).items():
            object.__setattr__(self, name, value)
        if "dtype" not in attributes:
            arrays = (self.running_mean, self.weight, self.bias)
            types = [array.dtype for array in arrays if array is not None]
            vars(self)["dtype"] = types[0] if types else np.dtype(np.float32)

    def _take_type(self, dtype: np.dtype[Any]) -> None:
        if self.dtype != dtype:
            vars(self).update(dtype=dtype, _introduced=False)

    def reset_running_stats(self) -> None:
        """Set the running statistics, if they are tracked, to their start: mean 0, variance 1, no batches."""
        for buffer, start in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if buffer is not None and self.track_running_stats:
                buffer[...] = start

    def reset_parameters(self, weight: str = "ones", rng: np.random.Generator | None = None) -> None:
        """Set running statistics and parameters to their start: weight 1, bias 0.

        Parameters
        ----------
        weight : {"ones", "uniform"}
            "uniform" draws the weight from U(0, 1), as the page of torch 1.7.1 says; its code says 1.
        rng : numpy.random.Generator, optional
            In the same state on all ranks, so that their weights are equal; seeded with 0 by default.

        Raises
        ------
        ValueError
            If `weight` is neither.
        """
        if weight not in ("ones", "uniform"):
            raise ValueError(f"expected weight 'ones' or 'uniform' (got {weight!r})")
        self.reset_running_stats()
        if self.bias is not None:
            self.bias.data[...] = 0
        if self.weight is not None:
            self.weight.data[...] = 1
            if weight == "uniform":
                rng = rng or np.random.default_rng(0)
                values = rng.random(self.num_features).astype(self.dtype)
                self.weight.data[...] = module_of(self.weight.data).asarray(values)

    def extra_repr(self) -> str:
        """Return the settings: torch's first ones, and of the others those that are not as by default."""
        parameter = self.bias if self.weight is None else self.weight
        array = self.running_mean if parameter is None else parameter.data
        others = {
            "bias": self.bias is not None or not self.affine,
            "dtype": self.dtype.name,
            "device": "cuda" if is_cupy(array) else None,
            "channels_last": self.channels_last,
            "activation": self.activation,
            "grad_reduction": self.grad_reduction,
            "name": self.name,
            "inplace": self.inplace,
        }
        usual = {
            "bias": True,
            "dtype": "float32",
            "channels_last": False,
            "grad_reduction": "none",
            "inplace": False,
        }
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        ) + "".join(f", {name}={value!r}" for name, value in others.items() if value != usual.get(name))


def restart_of(layer: BatchNormBase, *, name: str | None, model: int | None) -> Callable[[], object]:
    """Return what counts a layer's calls from there on, and names it: all ranks do so at the same time.

    A forward before it waits for its backward no more.
    """
    start = {"_model": model, "_calls_made": 0, "_introduced": False, "_waiting": NOTHING}
    return partial(vars(layer).update, start, name=name)


class FrozenStatistics(contextlib.ContextDecorator, contextlib.AbstractContextManager[None]):
    """The context of `frozen_statistics`, which may be entered again, within itself too."""

    def __init__(self, layers: list[BatchNormBase]) -> None:
        self._layers = layers

    def __enter__(self) -> None:
        for layer in self._layers:
            layer._frozen += 1

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer._frozen -= 1


@contextlib.contextmanager
def observing(layer: BatchNormBase, show: Callable[[Saved], None]) -> Iterator[None]:
    """Keep a layer in training mode, show each of its forwards, and put it back in its state."""
    training = layer.training
    layer.training, layer._observe = True, show
    try:
        yield
    finally:
        layer.training, layer._observe = training, None


class SyncBatchNorm(BatchNormBase):
    """Batch normalization by the statistics of the batches of all ranks, as torch.nn.SyncBatchNorm.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, with the mean and biased
    variance of each channel over the ranks, the samples and the spatial axes (Ioffe and Szegedy 2015).

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance; at least 0. With 0 the result of a constant channel is NaN.
    momentum : float or None
        Share of each batch in the running statistics; None averages over all batches.
    affine : bool
        Whether there are weight and bias, which start at 1 and 0.
    track_running_stats : bool
        Whether there are running statistics, which evaluation uses. If you set it to False later, training
        does not change them.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        Type of parameters and running statistics, by its name, or as NumPy's or torch's type. float32 is for
        16-bit data too: in a float16 layer a running variance above 65504 is inf, as in torch's.
    device : {"cpu", "cuda", None}
        Where parameters, running statistics and data are. None is the value of CUPY_SYNCBN_DEVICE, or "cuda"
        where CuPy sees a GPU, else "cpu".
    channels_last : bool
        Whether the channels are the last axis of the input.
    activation : {None, "relu", "leaky_relu"} or ("leaky_relu", slope)
        Applied to the result.
    grad_reduction : {"none", "sum", "mean"}
        Whether weight and bias get the gradients of this rank, for a data-parallel wrapper to average, or
        their sum or mean over the ranks. In training that takes no further message.
    name : str, optional
        The layer's name in errors, the same on all ranks. DistributedDataParallel names a layer that has
        none. By the names and the numbers of calls ranks notice that they call different layers of one size.
    bias : bool
        Whether there is a bias, if `affine`. Either parameter can be None, from the start or assigned.
    inplace : bool
        Write y over the input, which the backward finds from y: half the memory. See `sync_batch_norm` for
        what that takes. No conversion sets it, as whoever holds the input would find y there.

    Attributes
    ----------
    weight, bias : Parameter or None
        Of shape (C,). Without `requires_grad` none of their gradients is computed; see `Parameter`.
    running_mean, running_var : array or None
        Of shape (C,).
    num_batches_tracked : array or None
        Of shape (), int64.
    training : bool
        Whether it is in training mode; see `train` and `eval`.
    process_group : ProcessGroup or None
        The ranks. Assign it on all of them at the same time: the layer then counts its calls anew, and a
        forward before it has no backward.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    ModuleNotFoundError, RuntimeError
        If CuPy or a GPU is missing for "cuda", or ml_dtypes for bfloat16.

    Notes
    -----
    forward and backward are **collective** in training mode: every rank of the group must call them, also a
    rank without samples, with N = 0. Evaluation sends no messages, except that the backward reduces the
    gradients of weight and bias if `grad_reduction` says so. If you accumulate gradients over parts of a
    batch, each part has its own statistics. There is no second derivative.

    Layers can be copied and pickled, but not the forward that waits for its backward. A group of None, or of
    all ranks, becomes that of the program that loads the pickle. A group of some ranks works in the process
    that pickled it; elsewhere each use raises RuntimeError until you assign `process_group`.

    Examples
    --------
    >>> import numpy as np
    >>> bn = SyncBatchNorm(3)
    >>> y = bn(np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype("float32"))
    >>> bool(abs(y.mean()) < 1e-6)
    True
    >>> bn.backward(np.ones_like(y)).shape
    (8, 3, 4, 4)
    """

    def extra_repr(self) -> str:
        group = "" if self._group is None else f", process_group={self._group!r}"
        return super().extra_repr() + group

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks whose batches are one; None is all."""
        return self._group

    @process_group.setter
    def process_group(self, group: ProcessGroup | MPI.Intracomm | None) -> None:
        self._group = None if group is None else as_group(group)
        restart_of(self, name=self.name, model=None)()

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Any, process_group: ProcessGroup | MPI.Intracomm | None = None
    ) -> Any:
        """Turn all batch normalizations within an object into SyncBatchNorm, as torch names it.

        Parameters
        ----------
        module, process_group : see `convert_sync_batchnorm`
            The object, and the ranks.

        Returns
        -------
        object
            The converted layer or object.

        Raises
        ------
        TypeError
            See `convert_sync_batchnorm`.
        """
        return _converted(module, process_group)


class LayerSettings(TypedDict, total=False):
    """The keywords that all batch normalizations take."""

    dtype: Any
    device: str | None
    channels_last: bool
    activation: Activation
    grad_reduction: str
    name: str | None
    bias: bool
    inplace: bool


class _LocalBatchNorm(BatchNormBase):
    """Batch normalization by the statistics of this rank's batch."""

    _group = SINGLE

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, SINGLE, **settings)


class BatchNorm1d(_LocalBatchNorm):
    """Batch normalization of (N, C) or (N, C, L) input on one rank; see `SyncBatchNorm`."""

    _dimensions = (2, 3)


class BatchNorm2d(_LocalBatchNorm):
    """Batch normalization of (N, C, H, W) input on one rank; see `SyncBatchNorm`."""

    _dimensions = (4,)


class BatchNorm3d(_LocalBatchNorm):
    """Batch normalization of (N, C, D, H, W) input on one rank; see `SyncBatchNorm`."""

    _dimensions = (5,)


def convert_sync_batchnorm(module: Any, process_group: ProcessGroup | MPI.Intracomm | None = None) -> Any:
    """Turn all BatchNorm layers within an object into SyncBatchNorm layers.

    Parameters
    ----------
    module : object
        A layer, a Module, or any object that holds layers, directly or within other objects. Layers are found
        as items of lists, tuples and dicts, and as attributes, but not in other collections, closures,
        classes or Python modules. Within a Module, layers must not lie in objects that are no Modules.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all. SyncBatchNorm layers keep their group if it is None.

    Returns
    -------
    object
        The converted layer, if `module` is one; else `module`, changed in place, or a copy if it is a tuple
        of layers. New layers share the parameters and buffers of the old, and take over their settings and
        mode. A layer found in several places is one layer afterwards too.

    Raises
    ------
    TypeError
        If `process_group` is not a group; if `module` can hold no layers; if a BatchNorm layer lies where a
        Module does not see it, or is torch's. Nothing has changed.

    Warns
    -----
    UserWarning
        If no layer is found, or if a class derived from a BatchNorm has methods that SyncBatchNorm lacks.
        Classes derived from SyncBatchNorm are not changed.

    Examples
    --------
    >>> from cupy_syncbn import BatchNorm2d
    >>> net = {"stem": BatchNorm2d(8), "blocks": [BatchNorm2d(16), "relu"]}
    >>> weight = net["stem"].weight
    >>> net = convert_sync_batchnorm(net)
    >>> type(net["stem"]).__name__, net["stem"].weight is weight
    ('SyncBatchNorm', True)
    """
    return _converted(module, process_group)


def _converted(module: Any, process_group: ProcessGroup | MPI.Intracomm | None) -> Any:
    """Convert the layers within an object; warn the caller's caller of what is lost."""
    group = None if process_group is None else as_group(process_group)

    def is_old(value: Any) -> bool:
        return isinstance(value, BatchNormBase) and not (isinstance(value, SyncBatchNorm) and group is None)

    def synchronized(old: Any) -> Any:
        if not is_old(old):
            return old
        new: SyncBatchNorm = object.__new__(type(old) if isinstance(old, SyncBatchNorm) else SyncBatchNorm)
        state = BatchNormBase.__getstate__(old)
        attributes, slots = state if isinstance(state, tuple) else (state, {})
        vars(new).update(attributes)
        if type(new) is type(old):
            for name, value in slots.items():
                object.__setattr__(new, name, value)
        new.process_group = group
        return new

    layers = layers_within(module, BatchNormBase)
    check_reach(module, is_old)
    ours = SyncBatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
    for message in losses(filter(is_old, layers), *ours) if layers else [nothing_found(module)]:
        warnings.warn(message, UserWarning, stacklevel=3)
    return replace_within(module, synchronized, OPAQUE)
