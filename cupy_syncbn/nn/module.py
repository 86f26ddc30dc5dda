"""Parameters, and the modules that hold them: the parts of a network."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import methodcaller
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from cupy_syncbn.arrays import Array, array_module, check_writeable, module_of, move
from cupy_syncbn.checks import is_data_type
from cupy_syncbn.nn.records import NoBackward, Record
from cupy_syncbn.nn.tree import Kinds, Tree, has_members, items_of, join


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


@np.errstate(all="ignore")  # infinities and NaN are the data's, and pass through
def accumulation(parameter: Parameter, gradient: Array) -> Callable[[], object]:
    """Return what adds a gradient to that of a parameter, all that can fail being done."""
    grad = parameter.grad
    if grad is None:
        return partial(setattr, parameter, "grad", gradient)
    if not isinstance(grad, np.ndarray | np.generic):  # of CuPy, whose sum is one kernel
        return partial(operator.iadd, grad, gradient)
    total = (grad + gradient).astype(grad.dtype, copy=False)
    if not grad.flags.writeable:
        return partial(setattr, parameter, "grad", total)
    return partial(grad.__setitem__, ..., total)


class IncompatibleKeys(NamedTuple):
    """The names that a state dict lacked, and those that it had too many."""

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
    _tree: Tree
    """See `tree_of`."""
    _never_left: ClassVar[frozenset[str]] = frozenset({"_buffer_names", "_tree", "training"})
    """Attributes that are none of a forward's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; subclasses write it.

        Raises
        ------
        NotImplementedError
            If the subclass does not write it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the gradient of the input from that of the output, and add to the parameters' gradients.

        Raises
        ------
        NotImplementedError
            If the subclass does not write it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`."""
        return self.forward(*args, **kwargs)

    def __getstate__(self) -> Any:
        """Return the state that copies and pickles have: without the `_tree`, which they make anew."""
        state: Any = super().__getstate__()  # `(dict, slots)` if a subclass has slots
        attributes = state[0] if isinstance(state, tuple) else state
        attributes = {name: value for name, value in (attributes or {}).items() if name != "_tree"}
        return (attributes, state[1]) if isinstance(state, tuple) else attributes

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

    def _members(self) -> Iterable[tuple[str, Any]]:
        """Return the names and values among which parameters and modules are."""
        return vars(self).items()

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) of this module, named "", and of all within it, each once."""
        yield "", self
        yield from ((name, module) for name, module, _ in tree_of(self).within)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (dotted name, parameter) of all parameters, each once."""
        yield from tree_of(self).named_leaves

    def parameters(self) -> Iterator[Parameter]:
        """Return an iterator over all parameters, in the order of `named_parameters`."""
        return iter(tree_of(self).leaves)

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Yield (dotted name, array) of all buffers, each once."""
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, buffer in own_buffers(module):
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    yield join(prefix, name), buffer

    def buffers(self) -> Iterator[Array]:
        """Return an iterator over all buffers, in the order of `named_buffers`."""
        return (buffer for _, buffer in self.named_buffers())

    def train(self, mode: bool = True) -> Self:
        """Set training mode here and in all modules within; return this module.

        Parameters
        ----------
        mode : bool
            False for evaluation.
        """
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation mode here and in all modules within; return this module."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Set the gradients of all parameters to None."""
        for parameter in tree_of(self).leaves:
            parameter.grad = None

    def take_record(self) -> Record:
        """Return the record of the last forward, for its backward at any later time.

        So several forwards can wait: for each its record's ``backward``, in any order. Take the record
        before the next forward; no forward waits in the module then.

        Returns
        -------
        Record

        Raises
        ------
        RuntimeError
            If no forward of a batch normalization within waits for its backward.

        Notes
        -----
        Of modules other than batch normalizations it holds the values of attributes, so a forward leaves
        new arrays there, and does not change those of an earlier one.
        """
        parts = [module for _, module in self.named_modules()]
        waiting = [part._is_waiting() for part in parts]
        if any(each is False for each in waiting) and True not in waiting:
            raise RuntimeError(
                "there is no forward to take the record of: call it right after the forward, and outside of "
                "no_backward"
            )
        return Record(self.backward, [(part, part._take_left()) for part in parts])

    def forget(self) -> Self:
        """Drop the records of all forwards that wait for their backward; return this module.

        It is for a forward whose backward will not come, as after an error or a batch that is left out.
        """
        for _, module in self.named_modules():
            module._forget()
        return self

    def _left(self) -> dict[str, Any]:
        """Return the attributes in which a forward can have left something for the backward."""
        never = {*self._never_left, *self._buffer_names}
        return {
            name: value
            for name, value in vars(self).items()
            if name not in never and not has_members(value, _KINDS)
        }

    def _is_waiting(self) -> bool | None:
        """Tell whether a forward waits for its backward; None if this module cannot tell."""
        return None

    def _forget(self) -> None:
        """Drop the records of this module itself."""

    def _take_left(self) -> Any:
        """Return what the last forward has left in this module itself, for `_swap_left`."""
        return self._left()

    def _swap_left(self, left: Any) -> Any:
        """Put back what a forward has left; return what was there instead."""
        return swap_attributes(self, left)

    def _set_aside(self) -> Callable[[], object]:
        """Begin to leave nothing for a backward; return what puts back that which is there now."""
        before = self._left()
        return lambda: swap_attributes(self, {**dict.fromkeys(self._left(), _ABSENT), **before})

    def state_dict(self) -> dict[str, Array]:
        """Return the arrays of all parameters and buffers by name: the arrays themselves, not copies.

        Names, their order, shapes and types are those that torch gives to the same layers. An array that is
        found in several places has as many names.
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
        targets = self.state_dict()
        missing = [name for name in targets if name not in state]
        values = {name: move(state[name], np) for name in targets if name in state}
        for name in [name for name in missing if name.split(".")[-1] == "num_batches_tracked"]:
            if f"{name.removesuffix('num_batches_tracked')}running_mean" in values:
                missing.remove(name)
                values[name] = np.zeros((), np.int64)
        unexpected = [name for name in state if name not in targets]
        if strict and (missing or unexpected):
            raise KeyError(f"state_dict has missing keys {missing} and unexpected keys {unexpected}")
        for name, value in values.items():
            target = targets[name]
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
            targets[name][...] = module_of(targets[name]).asarray(value.astype(targets[name].dtype))
        return IncompatibleKeys(missing, unexpected)

    def to(self, device: str) -> Self:
        """Move all parameters and buffers to a device; return this module.

        Parameters
        ----------
        device : {"cpu", "cuda"}
            The device; "cuda" is the current one of CuPy.

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


_ABSENT = object()
_KINDS = Kinds(Module, Parameter, methodcaller("_members"))


def swap_attributes(module: Module, left: dict[str, Any]) -> dict[str, Any]:
    """Give a module's attributes values that a forward has left; return those that were there instead."""
    attributes, now = vars(module), module._left()
    there = {}
    for name, value in left.items():
        old = now.get(name, _ABSENT)
        if old is value or (old is _ABSENT and name in attributes):  # the latter is a parameter by now, say
            continue
        there[name] = old
        if value is _ABSENT:
            del attributes[name]
        else:
            attributes[name] = value
    return there


def no_backward(module: Module) -> contextlib.AbstractContextManager[None]:
    """Return a context for forwards that need no backward, and keep no batch alive.

    A forward that waits for its backward waits on: validation, or a part of a network that is computed once
    more later, does not take its place. Other modules than batch normalizations find their attributes
    afterwards as they were, but for parameters, buffers, modules and modes.

    Parameters
    ----------
    module : Module
        Holds the modules: those that it has at this call.

    Returns
    -------
    context manager
        It may be entered any number of times, and nested.

    Raises
    ------
    TypeError
        If `module` is not a Module.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_syncbn import BatchNorm1d
    >>> bn, x = BatchNorm1d(3, device="cpu"), np.random.default_rng(0).normal(size=(4, 3)).astype("f4")
    >>> y = bn(x)
    >>> with no_backward(bn):
    ...     other = bn(2 * x)
    >>> bn.backward(np.ones_like(y)).shape
    (4, 3)
    """
    if not isinstance(module, Module):
        raise TypeError(f"expected a Module (got {type(module).__name__})")
    return NoBackward(each for _, each in module.named_modules())


def own_buffers(module: Module) -> list[tuple[str, Array]]:
    """Return (name, array) of the buffers of a module itself."""
    named = [(name, getattr(module, name)) for name in module._buffer_names]
    return [(name, buffer) for name, buffer in named if buffer is not None]


def tree_of(module: Module) -> Tree:
    """Return all that is within a module: the nodes are modules, the leaves are parameters."""
    tree: Tree | None = vars(module).get("_tree")
    if tree is None or not tree.is_current(module):
        # Not by setattr, which a frozen dataclass refuses; and before the walk, which sees all attributes.
        vars(module)["_tree"] = Tree()
        vars(module)["_tree"] = tree = Tree(module, _KINDS)
    return tree


def _state(prefix: str, holder: Any, within: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of a module, list, tuple or dict, which is within others of these ids.

    The order is torch's: its own parameters, its buffers, then all within it, by each of its names.
    """
    members = holder._members() if isinstance(holder, Module) else items_of(holder)
    named = [(join(prefix, str(name)), value) for name, value in members]
    yield from ((name, value.data) for name, value in named if isinstance(value, Parameter))
    for name in holder._buffer_names if isinstance(holder, Module) else ():
        if getattr(holder, name) is not None:
            yield join(prefix, name), getattr(holder, name)
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
        """Call each layer on the result of the one before; return the last result."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Any) -> Any:
        """Take the gradient of the last forward's result back to the input, through the last layer first."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def __getitem__(self, index: int) -> Module:
        """Return a layer."""
        return self.layers[index]

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self.layers)


def check_gradient(name: str, parameter: Parameter) -> None:
    """Check that a parameter's gradient, which anybody may have assigned, can be added to.

    It must be None, or an array of floating-point numbers where the data is, of its shape.
    """
    grad, data = parameter.grad, parameter.data
    if grad is None:
        return
    kind = module_of(data).ndarray
    if isinstance(grad, np.generic) and data.shape == ():
        grad = np.asarray(grad)  # NumPy's sums give numbers for arrays without axes
    for role, array in (f"{name}.data", data), (f"{name}.grad", grad):
        if not isinstance(array, kind):
            raise TypeError(
                f"expected {role} to be a {kind.__module__}.{kind.__name__} "
                f"(got {type(array).__module__}.{type(array).__name__}): convert it"
            )
        if not (is_data_type(array.dtype) or array.dtype.kind in "fc"):
            raise TypeError(f"expected {role} in floating point (got {array.dtype}): use .astype(...)")
    if grad.shape != data.shape:
        raise ValueError(f"expected {name}.grad of the shape of its data, {data.shape} (got {grad.shape})")
