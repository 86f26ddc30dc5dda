"""Layers with parameters and buffers: Module, Sequential, the batch normalizations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from cupy_syncbn.arrays import Array, array_module, as_array, check_writeable, module_of, move
from cupy_syncbn.backends import backend_of
from cupy_syncbn.comm.call import Call
from cupy_syncbn.comm.groups import ProcessGroup, SingleProcessGroup, as_group
from cupy_syncbn.functional import (
    DATA_TYPES,
    Activation,
    Saved,
    activation_slope,
    check_grad_reduction,
    check_settings,
    check_types,
    is_data_type,
    sync_batch_norm,
    sync_batch_norm_backward,
)

if TYPE_CHECKING:
    from mpi4py import MPI


class Parameter:
    """An array that training changes, and its gradient.

    Parameters
    ----------
    data : array
        The values; kept, not copied.

    Attributes
    ----------
    data : array
        The values. An optimizer may change them in place, or assign others.
    grad : array or None
        The gradient, of the shape and type of `data`: None until a backward, which then adds to it.

    Examples
    --------
    >>> import numpy as np
    >>> weight = Parameter(np.ones(3))
    >>> for _ in range(2):
    ...     weight.accumulate(np.full(3, 0.5))
    >>> weight.grad
    array([1., 1., 1.])
    """

    def __init__(self, data: Array) -> None:
        self.data = data
        self.grad: Array | None = None

    def accumulate(self, gradient: Array) -> None:
        """Add to the gradient, in place unless it is read-only.

        Parameters
        ----------
        gradient : array
            Like `data`. The first is kept, not copied.
        """
        if self.grad is None:
            self.grad = gradient
            return
        if isinstance(self.grad, np.ndarray) and not self.grad.flags.writeable:
            self.grad = self.grad.copy()
        with np.errstate(all="ignore"):  # infinities and NaN are the data's, and pass through
            self.grad += gradient

    def __repr__(self) -> str:
        return f"Parameter(shape={self.data.shape}, dtype={self.data.dtype})"


class IncompatibleKeys(NamedTuple):
    """What a state dict lacked, and what it had too much."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """A part of a network. Subclasses write `forward` and `backward`.

    Parameters, buffers and modules are found through its attributes, and the lists, tuples and dicts in
    them, by dotted names: ``blocks.0.bn.weight``.

    Attributes
    ----------
    training : bool
        Whether it is in training mode.

    Examples
    --------
    >>> class Block(Module):
    ...     def __init__(self):
    ...         self.norms = [BatchNorm2d(8), BatchNorm2d(8)]
    >>> [name for name, _ in Block().named_parameters()]
    ['norms.0.weight', 'norms.0.bias', 'norms.1.weight', 'norms.1.bias']
    """

    training: bool = True
    _buffer_names: tuple[str, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output.

        Parameters
        ----------
        *args, **kwargs : object
            The subclass's.

        Returns
        -------
        object
            The subclass's.

        Raises
        ------
        NotImplementedError
            If the subclass does not write it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the gradient of the input from that of the output, and add to the parameters' gradients.

        Parameters
        ----------
        *args, **kwargs : object
            The subclass's.

        Returns
        -------
        object
            The subclass's.

        Raises
        ------
        NotImplementedError
            If the subclass does not write it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`."""
        return self.forward(*args, **kwargs)

    def register_buffer(self, name: str, array: Array | None) -> None:
        """Set an attribute that is part of the state, but not trained.

        Parameters
        ----------
        name : str
            The attribute.
        array : array or None
            Its value; None is left out of the state.
        """
        setattr(self, name, array)
        if name not in self._buffer_names:
            self._buffer_names = (*self._buffer_names, name)

    def _members(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, value) of what may hold parameters and modules."""
        yield from vars(self).items()

    def _leaves(self) -> Iterator[tuple[str, Parameter | Module]]:
        """Yield the parameters and modules that are not within another module."""
        pending = list(self._members())[::-1]
        seen: set[int] = set()
        while pending:
            name, value = pending.pop()
            if isinstance(value, Parameter | Module):
                yield name, value
            elif isinstance(value, list | tuple | dict) and id(value) not in seen:
                seen.add(id(value))
                pending += [(f"{name}.{key}", item) for key, item in _items(value)][::-1]

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Go through this module, named "", and all within it, each once.

        Yields
        ------
        name : str
            Dotted.
        module : Module
            The module.
        """
        pending: list[tuple[str, Module]] = [("", self)]
        seen: set[int] = set()
        while pending:
            prefix, module = pending.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield prefix, module
            children = [(_join(prefix, name), leaf) for name, leaf in module._leaves()]
            pending += [(name, leaf) for name, leaf in children[::-1] if isinstance(leaf, Module)]

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Go through all parameters, each once.

        Yields
        ------
        name : str
            Dotted.
        parameter : Parameter
            The parameter.
        """
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, leaf in module._leaves():
                if isinstance(leaf, Parameter) and id(leaf) not in seen:
                    seen.add(id(leaf))
                    yield _join(prefix, name), leaf

    def parameters(self) -> Iterator[Parameter]:
        """Go through all parameters, each once.

        Returns
        -------
        iterator of Parameter
            In the order of `named_parameters`.
        """
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Go through all buffers, each once.

        Yields
        ------
        name : str
            Dotted.
        array : array
            The buffer.
        """
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name in module._buffer_names:
                buffer = getattr(module, name)
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    yield _join(prefix, name), buffer

    def buffers(self) -> Iterator[Array]:
        """Go through all buffers, each once.

        Returns
        -------
        iterator of array
            In the order of `named_buffers`.
        """
        return (buffer for _, buffer in self.named_buffers())

    def train(self, mode: bool = True) -> Self:
        """Set training mode here and in all modules within.

        Parameters
        ----------
        mode : bool
            False for evaluation.

        Returns
        -------
        Self
            This module.
        """
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation mode here and in all modules within.

        Returns
        -------
        Self
            This module.
        """
        return self.train(False)

    def zero_grad(self) -> None:
        """Set the gradients of all parameters to None."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Array]:
        """Return the arrays of all parameters and buffers by name: the arrays themselves, not copies.

        Returns
        -------
        dict of str to array
            Names, their order, shapes and types as torch gives them to the same layers: what is found in
            several places has as many names.
        """
        return dict(_state("", self, ()))

    @np.errstate(all="ignore")  # values that exceed a type become infinite, as in a forward
    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Copy values into the parameters and buffers.

        Parameters
        ----------
        state : mapping of str to array
            From `state_dict`, ``np.load`` of an npz file, ``safetensors.numpy``, or a torch state_dict with
            its tensors: anything that `numpy.asarray` takes. An older one without ``num_batches_tracked``
            counts as 0. Values are rounded to the types of the parameters and buffers. Of an array with
            several names the last value stays, as in torch.
        strict : bool
            Whether the names must be the same.

        Returns
        -------
        IncompatibleKeys
            ``missing_keys`` and ``unexpected_keys``, empty if `strict`.

        Raises
        ------
        KeyError
            If names are missing or unexpected, and `strict`.
        ValueError
            If a shape differs, or an array here is read-only.
        TypeError
            If a type cannot be cast. Nothing has been changed in any of these cases.
        """
        own = self.state_dict()
        missing = [name for name in own if name not in state]
        values = {name: move(state[name], np) for name in own if name in state}
        for name in [name for name in missing if name.split(".")[-1] == "num_batches_tracked"]:
            if f"{name.removesuffix('num_batches_tracked')}running_mean" in values:
                missing.remove(name)
                values[name] = np.zeros((), np.int64)
        unexpected = [name for name in state if name not in own]
        if strict and (missing or unexpected):
            raise KeyError(f"state_dict has missing keys {missing} and unexpected keys {unexpected}")
        for name, value in values.items():
            target = own[name]
            check_writeable(name, target)
            if target.shape == () and value.size == 1:  # torch had counters of shape (1,) before 0.4
                values[name] = value = value.reshape(())
            if value.shape != target.shape:
                raise ValueError(f"expected {name} of shape {target.shape} (got {value.shape})")
            if value.dtype == "V2" and target.dtype.name == "bfloat16":
                values[name] = value.view(target.dtype)  # npz files keep its bits, not its name
            elif not _can_cast(value, target.dtype):
                raise TypeError(f"expected {name} to be {target.dtype} (got {value.dtype})")
        for name, value in values.items():
            own[name][...] = module_of(own[name]).asarray(value.astype(own[name].dtype))
        return IncompatibleKeys(missing, unexpected)

    def to(self, device: str) -> Self:
        """Move all parameters and buffers to a device.

        Parameters
        ----------
        device : {"cpu", "cuda"}
            The device; "cuda" is the current one of CuPy.

        Returns
        -------
        Self
            This module.

        Raises
        ------
        ValueError
            If there is no such device.
        ModuleNotFoundError, RuntimeError
            If CuPy is not installed, or sees no GPU.
        """
        xp = array_module(device)
        for parameter in self.parameters():
            parameter.data = move(parameter.data, xp)
            if parameter.grad is not None:
                parameter.grad = move(parameter.grad, xp)
        for _, module in self.named_modules():
            for name in module._buffer_names:
                buffer = getattr(module, name)
                setattr(module, name, None if buffer is None else move(buffer, xp))
        return self


def _items(holder: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    return holder.items() if isinstance(holder, dict) else enumerate(holder)


def _state(prefix: str, holder: Any, within: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of a module, list, tuple or dict, which is within others of these ids.

    In torch's order: its own parameters, its buffers, then what is within it, by each of its names.
    """
    members = holder._members() if isinstance(holder, Module) else _items(holder)
    named = [(_join(prefix, str(name)), value) for name, value in members]
    yield from ((name, value.data) for name, value in named if isinstance(value, Parameter))
    for name in holder._buffer_names if isinstance(holder, Module) else ():
        if getattr(holder, name) is not None:
            yield _join(prefix, name), getattr(holder, name)
    within = (*within, id(holder))
    for name, value in named:
        if isinstance(value, Module | list | tuple | dict) and id(value) not in within:
            yield from _state(name, value, within)


def _can_cast(values: Array, target: np.dtype[Any]) -> bool:
    """Tell whether values may be converted to a type."""
    if np.can_cast(values.dtype, target, "same_kind"):
        return True
    # NumPy counts bfloat16 to float16 as no cast of one kind, nor counters in floating-point numbers.
    return is_data_type(values.dtype) and (
        is_data_type(target) or (target.kind == "i" and bool((values.astype(target) == values).all()))
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


class Sequential(Module):
    """Modules one after the other, named "0", "1" and so on.

    Parameters
    ----------
    *layers : Module
        The modules, in the order of the forward.

    Examples
    --------
    >>> net = Sequential(BatchNorm1d(4), BatchNorm1d(4))
    >>> list(net.state_dict())[:3]
    ['0.weight', '0.bias', '0.running_mean']
    """

    def __init__(self, *layers: Module) -> None:
        self.layers = list(layers)

    def _members(self) -> Iterator[tuple[str, Any]]:
        return ((str(index), layer) for index, layer in enumerate(self.layers))

    def forward(self, x: Any) -> Any:
        """Call each layer on the result of the one before.

        Parameters
        ----------
        x : object
            The first layer's input, such as an array of shape (N, C, *spatial).

        Returns
        -------
        object
            The last layer's result.
        """
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Any) -> Any:
        """Take the gradient of the output back to the input, through the last layer first.

        Parameters
        ----------
        dy : object
            The gradient of the last forward's result, of its shape and type.

        Returns
        -------
        object
            The gradient of the input.
        """
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def __getitem__(self, index: int) -> Module:
        """Return a layer."""
        return self.layers[index]

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self.layers)


class _BatchNorm(Module):
    """What all batch normalizations share: parameters, running statistics, forward and backward."""

    _buffer_names = ("running_mean", "running_var", "num_batches_tracked")
    _dimensions: ClassVar[tuple[int, ...] | None] = None

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: Array | None
    process_group: ProcessGroup | None
    _exchanges: int
    _introduced: bool
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
        *,
        dtype: Any = "float32",
        device: str | None = None,
        channels_last: bool = False,
        activation: Activation = None,
        grad_reduction: str = "none",
        name: str | None = None,
    ) -> None:
        self.num_features = operator.index(num_features)
        if self.num_features < 1:
            raise ValueError(f"expected num_features of at least 1 (got {num_features})")
        check_settings(eps, momentum)
        check_grad_reduction(grad_reduction)
        activation_slope(activation)
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.channels_last, self.activation = channels_last, activation
        self.grad_reduction, self.name = grad_reduction, name
        xp, shape, dtype = array_module(device), (self.num_features,), data_type(dtype)
        self.weight = Parameter(xp.ones(shape, dtype)) if affine else None
        self.bias = Parameter(xp.zeros(shape, dtype)) if affine else None
        self.running_mean = xp.zeros(shape, dtype) if track_running_stats else None
        self.running_var = xp.ones(shape, dtype) if track_running_stats else None
        self.num_batches_tracked = xp.zeros((), np.int64) if track_running_stats else None
        self.dtype = dtype
        self._saved: Saved | None = None
        self._begin()

    def forward(self, x: Array, residual: Array | None = None, out: Array | None = None) -> Array:
        """Normalize a batch; see `sync_batch_norm`.

        Parameters
        ----------
        x : array of shape (N, C, *spatial), or (N, *spatial, C) if `channels_last`
            The batch, of the layer's type, or float16 or bfloat16 with a float32 layer; of NumPy or CuPy, or
            what shares memory with them, such as a torch tensor or a JAX array.
        residual : array like `x`, optional
            Added before the activation.
        out : array like `x`, optional
            Where to write the result.

        Returns
        -------
        array like `x`
            The result, in the memory order of `x`.

        Raises
        ------
        TypeError, ValueError
            If an argument is wrong. Nothing has been changed then.
        RemoteRankError, RankMismatchError, CollectiveTimeoutError
            See `sync_batch_norm`.

        Notes
        -----
        **Collective** over the ranks of a SyncBatchNorm in training mode. The first such call sends one more
        message, of 24 bytes.
        """
        peers = _peers(self.process_group, self.training)
        if self.training and not self._introduced:
            # Vectors of other lengths must never meet: a fixed-size one tells first.
            introduction = self._call(f"introduction with {self.dtype} parameters")
            introduction.exchange(peers, np.array(introduction.trailer(peers)))
            self._introduced = True
        call = self._call("forward")
        with call.faults_join(peers, 4 * self.num_features + 4, module_of(self._array(x))):
            if not isinstance(x, np.ndarray):  # with one of a subclass, `out` may still be the same object
                x = as_array(x)
            self._check(x)
        tracks = not self.training or (self.track_running_stats and not self._frozen)
        y, self._saved = sync_batch_norm(
            x,
            None if self.weight is None else self.weight.data,
            None if self.bias is None else self.bias.data,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            process_group=self.process_group,
            channels_last=self.channels_last,
            activation=self.activation,
            residual=residual,
            out=out,
            call=call,
        )
        self._exchanges += self.training
        if self._observe is not None:
            self._observe(self._saved)
        return y

    def _begin(self) -> None:
        """Count exchanges from here on: all ranks do so at the same time."""
        self._exchanges = 0
        self._introduced = False

    if TYPE_CHECKING:  # so that `y = bn(x)` has a type

        def __call__(self, x: Array, residual: Array | None = None, out: Array | None = None) -> Array: ...

    def _call(self, direction: str) -> Call:
        return Call(self.name or type(self).__name__, self.num_features, direction, self._exchanges)

    def _array(self, x: Array) -> Array:
        """Return an array of the layer's, or `x` if it has none."""
        own = self.running_mean if self.weight is None else self.weight.data
        return x if own is None else own

    def _check(self, x: Array) -> None:
        """Check what `sync_batch_norm` cannot know; it checks the rest."""
        own = self._array(x)
        if backend_of(x) is not backend_of(own):
            here, there = (("cpu", "cuda"), ("cuda", "cpu"))[module_of(own) is not np]
            raise TypeError(
                f"expected the input on the layer's device, {here} (got {module_of(x).__name__}.ndarray): "
                f"move the layer by .to({there!r}), or the input by cupy.asarray or .get()"
            )
        if self._dimensions and x.ndim not in self._dimensions:
            wanted = " or ".join(f"{n}D" for n in self._dimensions)
            raise ValueError(f"expected {wanted} input (got {x.ndim}D input)")
        check_types("the layer", self.dtype, x.dtype)

    def backward(self, dy: Array) -> Array | tuple[Array, Array]:
        """Compute the gradient of the last forward's input; see `sync_batch_norm_backward`.

        Parameters
        ----------
        dy : array like the last forward's result
            The gradient of the result.

        Returns
        -------
        dx : array like `x`
            The gradient of the input. Those of weight and bias are added to their ``grad``.
        dresidual : array like `x`
            The gradient of the residual, if the forward was given one: (dx, dresidual) is returned then.

        Raises
        ------
        RuntimeError
            If there was no forward since the last backward.
        TypeError, ValueError
            If `dy` does not match the result, or a ``grad`` that is there already does not match its
            parameter. The backward can be called again then.
        RemoteRankError, RankMismatchError, CollectiveTimeoutError
            See `sync_batch_norm`.

        Notes
        -----
        **Collective** over the ranks of a SyncBatchNorm, if its forward was, or if `grad_reduction` is not
        "none".
        """
        saved = self._saved
        call = self._call("backward") if saved is None else saved.call._replace(direction="backward")
        exchanges = (self.training if saved is None else saved.synchronized) or self.grad_reduction != "none"
        peers = _peers(self.process_group if saved is None else saved.group, exchanges)
        library = module_of(self._array(dy) if saved is None else saved.x)
        with call.faults_join(peers, 2 * self.num_features + 3, library):
            if saved is None:
                raise RuntimeError("backward needs a forward before it: each forward serves one backward")
            for name, parameter in (("weight", self.weight), ("bias", self.bias)):
                if parameter is not None:
                    check_gradient(name, parameter)
        gradients = sync_batch_norm_backward(dy, saved, grad_reduction=self.grad_reduction)
        # A rank that fails after the exchange has another number than the others, and they find out.
        self._exchanges += exchanges
        self._saved = None
        for parameter, gradient in ((self.weight, gradients.weight), (self.bias, gradients.bias)):
            if parameter is not None and gradient is not None:
                parameter.accumulate(gradient)
        return gradients.x if gradients.residual is None else (gradients.x, gradients.residual)

    def __getstate__(self) -> Any:
        """Return what copies and pickles have: not the forward that waits for its backward."""
        state = {name: value for name, value in vars(self).items() if name not in ("_frozen", "_observe")}
        state["_saved"] = None
        whole = super().__getstate__()  # a pair where a subclass has slots
        return (state, whole[1]) if isinstance(whole, tuple) else state

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
            "uniform" draws the weight from U(0, 1), as the documentation of torch 1.7.1 says (its code,
            and every later page, say 1).
        rng : numpy.random.Generator, optional
            What draws them: in the same state on all ranks, so that their weights are equal. By default
            it is seeded with 0.

        Raises
        ------
        ValueError
            If `weight` is neither.
        """
        if weight not in ("ones", "uniform"):
            raise ValueError(f"expected weight 'ones' or 'uniform' (got {weight!r})")
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            self.weight.data[...] = 1
            self.bias.data[...] = 0
            if weight == "uniform":
                rng = rng or np.random.default_rng(0)
                values = rng.random(self.num_features).astype(self.dtype)
                self.weight.data[...] = module_of(self.weight.data).asarray(values)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats})"
        )


def _peers(group: ProcessGroup | MPI.Intracomm | None, exchanges: bool) -> ProcessGroup:
    """Return the ranks that a call exchanges with."""
    return as_group(group) if exchanges else SingleProcessGroup()


def check_gradient(name: str, parameter: Parameter) -> None:
    """Check that a parameter and its gradient, which anybody may have assigned, can be added to.

    Raises
    ------
    TypeError, ValueError
        If the gradient is not None, nor an array of floating-point numbers as the data, of their shape.
    """
    grad, data = parameter.grad, parameter.data
    if grad is None:
        return
    kind = module_of(data).ndarray
    if isinstance(grad, np.generic) and data.shape == ():
        grad = np.asarray(grad)  # NumPy's sums give numbers for arrays without axes
    for what, array in (f"{name}.data", data), (f"{name}.grad", grad):
        if not isinstance(array, kind):
            raise TypeError(
                f"expected {what} to be a {kind.__module__}.{kind.__name__} "
                f"(got {type(array).__module__}.{type(array).__name__}): convert it"
            )
        if not (is_data_type(array.dtype) or array.dtype.kind in "fc"):
            raise TypeError(f"expected {what} in floating point (got {array.dtype}): use .astype(...)")
    if grad.shape != data.shape:
        raise ValueError(f"expected {name}.grad of the shape of its data, {data.shape} (got {grad.shape})")


def data_type(dtype: Any) -> np.dtype[Any]:
    """Return the type of parameters and buffers that an argument `dtype` means.

    Raises
    ------
    TypeError
        If it is none of the types of data.
    ModuleNotFoundError
        If it is "bfloat16" and ml_dtypes is not installed.
    """
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    result: np.dtype[Any] = np.dtype(dtype)
    if not is_data_type(result):
        raise TypeError(f"expected dtype to be one of {', '.join(DATA_TYPES)} (got {dtype!r})")
    return result


class SyncBatchNorm(_BatchNorm):
    """Batch normalization by the statistics of the batches of all ranks, as torch.nn.SyncBatchNorm.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, with the mean and biased
    variance of each channel over the ranks, the samples and the spatial axes (Ioffe and Szegedy 2015).

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        Share of each batch in the running statistics; None averages over all batches.
    affine : bool
        Whether there are weight and bias, which start at 1 and 0.
    track_running_stats : bool
        Whether there are running statistics, which evaluation uses. Set to False later, it keeps training
        from changing them.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        Type of parameters and running statistics. float32 is for 16-bit data too.
    device : {"cpu", "cuda", None}
        Where parameters and running statistics are, and the data must be: None is what CUPY_SYNCBN_DEVICE
        says, or "cuda" where CuPy sees a GPU, else "cpu".
    channels_last : bool
        Whether the channels are the last axis of the input.
    activation : {None, "relu", "leaky_relu"} or ("leaky_relu", slope)
        Applied to the result.
    grad_reduction : {"none", "sum", "mean"}
        Whether weight and bias get the gradients of this rank, for a data-parallel wrapper to average, or
        their sum or mean over the ranks, which comes with the backward's exchange at no cost.
    name : str, optional
        What errors call the layer, the same on all ranks; DistributedDataParallel gives it a name if it has
        none. Ranks that call different layers of one size find out by the names, or by the number of calls.

    Attributes
    ----------
    weight, bias : Parameter or None
        Of shape (C,).
    running_mean, running_var : array or None
        Of shape (C,).
    num_batches_tracked : array or None
        Of shape (), int64.
    training : bool
        Whether it is in training mode; see `train` and `eval`.
    process_group : ProcessGroup or None
        The ranks. All may assign others, and count the layer's calls anew from there on.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    ModuleNotFoundError, RuntimeError
        If CuPy or a GPU is missing for "cuda", or ml_dtypes for bfloat16.

    Notes
    -----
    forward and backward are **collective** in training mode: every rank of the group must call them, one
    with no samples too, with N = 0. In evaluation mode nothing is exchanged, except that the backward
    reduces the gradients of weight and bias if `grad_reduction` says so.

    Layers can be copied and pickled, without a forward that waits for its backward. A group of None, or of
    all ranks, is then that of the program that loads the pickle. One of some ranks stays itself in the
    process that pickled it; elsewhere each use raises RuntimeError until `process_group` is assigned.

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
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            dtype=dtype,
            device=device,
            channels_last=channels_last,
            activation=activation,
            grad_reduction=grad_reduction,
            name=name,
        )
        self.process_group = process_group

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks whose batches are one; None is all."""
        group: ProcessGroup | None = vars(self).get("process_group")  # where copies and pickles find it too
        return group

    @process_group.setter
    def process_group(self, group: ProcessGroup | MPI.Intracomm | None) -> None:
        # None stays None: the world is known at the first exchange, not at import.
        vars(self)["process_group"] = None if group is None else as_group(group)
        self._begin()

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Any, process_group: ProcessGroup | MPI.Intracomm | None = None
    ) -> Any:
        """Turn all batch normalizations within an object into SyncBatchNorm.

        Parameters
        ----------
        module : object
            See the function `convert_sync_batchnorm`, of which this is torch's name.
        process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
            The ranks whose batches are one; None is all.

        Returns
        -------
        object
            The converted layer or object.

        Raises
        ------
        TypeError
            If `process_group` is not a group.
        """
        from cupy_syncbn.convert import convert_sync_batchnorm  # which imports this file

        return convert_sync_batchnorm(module, process_group)


class _LocalBatchNorm(_BatchNorm):
    """Batch normalization by the statistics of this rank's batch."""

    process_group = SingleProcessGroup()


class BatchNorm1d(_LocalBatchNorm):
    """Batch normalization of (N, C) or (N, C, L) input on one rank.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats : see `SyncBatchNorm`
        The number of channels, and the settings.
    dtype, device, channels_last, activation, grad_reduction, name : see `SyncBatchNorm`
        Keyword arguments.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or in `forward` the input has another number of dimensions.
    ModuleNotFoundError, RuntimeError
        If CuPy or a GPU is missing for "cuda", or ml_dtypes for bfloat16.
    """

    _dimensions = (2, 3)


class BatchNorm2d(_LocalBatchNorm):
    """Batch normalization of (N, C, H, W) input on one rank.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats : see `SyncBatchNorm`
        The number of channels, and the settings.
    dtype, device, channels_last, activation, grad_reduction, name : see `SyncBatchNorm`
        Keyword arguments.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or in `forward` the input has another number of dimensions.
    ModuleNotFoundError, RuntimeError
        If CuPy or a GPU is missing for "cuda", or ml_dtypes for bfloat16.
    """

    _dimensions = (4,)


class BatchNorm3d(_LocalBatchNorm):
    """Batch normalization of (N, C, D, H, W) input on one rank.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats : see `SyncBatchNorm`
        The number of channels, and the settings.
    dtype, device, channels_last, activation, grad_reduction, name : see `SyncBatchNorm`
        Keyword arguments.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or in `forward` the input has another number of dimensions.
    ModuleNotFoundError, RuntimeError
        If CuPy or a GPU is missing for "cuda", or ml_dtypes for bfloat16.
    """

    _dimensions = (5,)
