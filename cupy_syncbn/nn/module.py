"""Modules: the parts of a network, which hold parameters, buffers and other modules."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import methodcaller
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from cupy_syncbn.arrays import Array, array_module, as_array, is_cupy, module_of, move, type_name
from cupy_syncbn.checks import data_type, is_data_type
from cupy_syncbn.nn.parameter import Parameter
from cupy_syncbn.nn.records import NoBackward, Record
from cupy_syncbn.nn.state import as_buffer, assign, check_mapping, fitted, is_array, names_differ
from cupy_syncbn.nn.tree import Kinds, Tree, has_members, items_of, join, two_of_one_name


class IncompatibleKeys(NamedTuple):
    """Names missing from a state dict, and unexpected ones."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """A part of a network. Subclasses write `forward` and `backward`.

    Parameters, buffers and modules are found through its attributes, and the lists, tuples and dicts in
    them, by dotted names: ``blocks.0.bn.weight``.

    To assign an array to a parameter or buffer copies its values: they must be on the same device and of the
    same shape, and are rounded to the type. A Parameter replaces a parameter; None replaces either.

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
    _parameter_names: tuple[str, ...] = ()
    """Attributes that are parameters or None."""
    _transient: tuple[str, ...] = ("_tree",)
    """Attributes that no copy has."""
    _tree: Tree
    """See `tree_of`."""
    _never_left: ClassVar[frozenset[str]] = frozenset({"_buffer_names", "_tree", "training"})
    """Attributes that are none of a forward's."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute: of a parameter or buffer, given an array, the values."""
        current = self.__dict__.get(name)
        if value is not None:
            if name in self._buffer_names:
                value = _buffer_after(name, current, value)
            elif isinstance(current, Parameter) or name in self._parameter_names:
                value = _parameter_after(name, current, value)
        super().__setattr__(name, value)

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
        """Return the state of copies and pickles: without forwards that wait, and what is made anew."""
        state: Any = super().__getstate__()  # `(dict, slots)` if a subclass has slots
        attributes = state[0] if isinstance(state, tuple) else state
        attributes = {
            name: value for name, value in (attributes or {}).items() if name not in self._transient
        }
        return (attributes, state[1]) if isinstance(state, tuple) else attributes

    def register_buffer(self, name: str, array: Array | None) -> None:
        """Set an attribute that is part of the state, but not trained.

        Parameters
        ----------
        name : str
            The attribute.
        array : array or None
            Its value, kept and not copied; None is left out of the state.

        Raises
        ------
        TypeError
            If `name` is not a str, or `array` not an array.
        KeyError
            If `name` is empty or has a dot, or is another attribute.
        """
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a buffer to be a str (got {type_name(name)})")
        if not name or "." in name:
            raise KeyError(f"expected the name of a buffer to be neither empty nor with a dot (got {name!r})")
        if name not in self._buffer_names:
            present = getattr(self, name, None)
            is_free = present is None or is_array(present)
            is_taken = name in self._parameter_names or isinstance(getattr(type(self), name, None), property)
            if is_taken or not is_free:
                raise KeyError(
                    f"expected the name of a buffer to be a new one (got {name!r}, which this "
                    f"{type(self).__name__} has for something else): use another"
                )
        value = None if array is None else _buffer_after(name, None, array)
        super().__setattr__(name, value)
        if name not in self._buffer_names:
            self._buffer_names = (*self._buffer_names, name)

    def _members(self) -> Iterable[tuple[str, Any]]:
        """Return the names and values among which parameters and modules are."""
        return vars(self).items()

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) of this module, named "", and of all within it, each once."""
        yield "", self
        yield from ((name, module) for name, module, _ in tree_of(self).within)

    def modules(self) -> Iterator[Module]:
        """Return an iterator over this module and all within it, in the order of `named_modules`."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) of the modules that are within no other one in this, each once."""
        met: set[int] = set()
        for name, module in tree_of(self).root_nodes:
            if id(module) not in met:
                met.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """Return an iterator over the modules of `named_children`."""
        return (module for _, module in self.named_children())

    def apply(self, fn: Callable[[Module], object]) -> Self:
        """Call a function with all modules within, then with this module; return this module.

        Parameters
        ----------
        fn : callable
            Called once with each module, with those within it before.
        """
        for module in list(_inside_out(self, set())):
            fn(module)
        return self

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

        Raises
        ------
        ValueError
            If `mode` is no bool.
        """
        if not isinstance(mode, bool | np.bool_):
            raise ValueError(f"expected mode True or False (got {mode!r}): use eval() for evaluation")
        mode = bool(mode)
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation mode here and in all modules within; return this module."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad` of all parameters; return this module.

        Batch normalizations that are to stay as they are need `eval` too, for their running statistics.

        Parameters
        ----------
        requires_grad : bool
            False to freeze them; see `Parameter`.
        """
        for parameter in tree_of(self).leaves:
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters.

        Parameters
        ----------
        set_to_none : bool
            Whether they become None. Else those that are there become 0, in place unless read-only.
        """
        for parameter in tree_of(self).leaves:
            grad = parameter.grad
            if set_to_none or grad is None:
                parameter.grad = None
            elif is_cupy(grad) or (isinstance(grad, np.ndarray) and grad.flags.writeable):
                grad[...] = 0
            else:
                parameter.grad = np.zeros_like(grad)

    def take_record(self) -> Record:
        """Return the record of the last forward, for its backward at any later time.

        With a record for each, several forwards can wait; call the ``backward`` of the records in any order.
        Take the record before the next forward; after that, no forward waits in the module.

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
                "no forward waits here: call take_record right after the forward, and outside of no_backward"
            )
        return Record(self.backward, [(part, part._take_left()) for part in parts])

    def forget(self) -> Self:
        """Drop the records of all forwards that wait for their backward; return this module.

        Use it after a forward whose backward will not come: after an error, or for a batch that is left out.
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
        tree_of(self)  # which finds two members of one name
        state: dict[str, Array] = {}
        for name, array in _state("", self, ()):
            if state.setdefault(name, array) is not array:
                raise two_of_one_name(name)
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Copy values into the parameters and buffers.

        Parameters
        ----------
        state : mapping of str to array
            From `state_dict`, ``np.load`` of an npz file, ``safetensors.numpy``, or a torch state_dict with
            its tensors: anything that `numpy.asarray` takes. An older one without ``num_batches_tracked``
            leaves the present one. Values are rounded to the types of the parameters and buffers; fractions
            of counters are cut off. An array with several names keeps the last value, as in torch.
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
            If `state` is not a mapping, or a type cannot be cast. None of these errors changes anything.
        """
        check_mapping(state)
        targets = self.state_dict()
        missing = [name for name in targets if name not in state]
        values = {name: move(state[name], np) for name in targets if name in state}
        for name in [name for name in missing if name.split(".")[-1] == "num_batches_tracked"]:
            if f"{name.removesuffix('num_batches_tracked')}running_mean" in values:
                missing.remove(name)
        unexpected = [name for name in state if name not in targets]
        if strict and (missing or unexpected):
            raise names_differ(missing, unexpected)
        values = {name: fitted(name, value, targets[name]) for name, value in values.items()}
        for name, value in values.items():
            targets[name][...] = module_of(targets[name]).asarray(value)
        return IncompatibleKeys(missing, unexpected)

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """Move all parameters, gradients and buffers to a device, or change their type; return this module.

        Parameters
        ----------
        device : {"cpu", "cuda"}, optional
            The device; "cuda" is the current one of CuPy. As in torch, a type may stand here.
        dtype : {"float16", "bfloat16", "float32", "float64"}, optional
            The type of those that have floating-point numbers, and the `dtype` of batch normalizations: they
            compare it between ranks at their next call.

        Raises
        ------
        ValueError
            If there is no such device.
        TypeError
            If there is no such type, or neither is given.
        ModuleNotFoundError, RuntimeError
            If CuPy is not installed, or sees no GPU.

        Notes
        -----
        A backward takes dy on the device and in the type of its forward.
        """
        xp, dtype = _target_of(device, dtype)
        new: dict[int, tuple[Array, Array]] = {}  # by the old one's id, so that what is shared stays so

        def converted(array: Array | None) -> Any:
            if array is not None and id(array) not in new:
                new[id(array)] = array, _converted(array, xp, dtype)
            return None if array is None else new[id(array)][1]

        writes: list[Callable[[], object]] = []
        for parameter in self.parameters():
            for name in "data", "grad":
                writes.append(partial(setattr, parameter, name, converted(getattr(parameter, name))))
        for module in self.modules():
            for name in module._buffer_names:
                buffer = converted(getattr(module, name))
                writes.append(partial(object.__setattr__, module, name, buffer))
        for write in writes:
            write()
        if dtype is not None:
            for module in self.modules():
                module._take_type(dtype)
        return self

    def _take_type(self, dtype: np.dtype[Any]) -> None:
        """Take note of the new type of parameters and buffers."""

    def float(self) -> Self:
        """Change parameters, gradients and buffers to float32, by `to`; return this module."""
        return self.to(dtype="float32")

    def double(self) -> Self:
        """Change parameters, gradients and buffers to float64, by `to`; return this module."""
        return self.to(dtype="float64")

    def half(self) -> Self:
        """Change parameters, gradients and buffers to float16, by `to`; return this module."""
        return self.to(dtype="float16")

    def bfloat16(self) -> Self:
        """Change parameters, gradients and buffers to bfloat16, by `to`; return this module."""
        return self.to(dtype="bfloat16")

    def extra_repr(self) -> str:
        """Return what `repr` says of this module beside the modules within; subclasses write it."""
        return ""

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        extra = self.extra_repr()
        children = [f"({name}): {module!r}" for name, module in tree_of(self).root_nodes]
        if not children and "\n" not in extra:
            return f"{type(self).__name__}({extra})"
        lines = "\n".join([*filter(None, [extra]), *children]).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {lines}\n)"


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


def check_module(module: object) -> None:
    """Raise TypeError for an object that is no Module of this package, such as one of torch's."""
    if not isinstance(module, Module):
        raise TypeError(
            f"expected a Module of cupy_syncbn (got {type_name(module)}): derive its class from "
            "cupy_syncbn.Module, or hold its parts in one, as Sequential does"
        )


def no_backward(module: Module) -> contextlib.AbstractContextManager[None]:
    """Return a context for forwards that need no backward, and keep no batch alive.

    Validation, or a part of a network that is computed once more later, does not replace a forward that waits
    for its backward. After the context the attributes of other modules than batch normalizations are as
    before it, except parameters, buffers, modules and modes.

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
    check_module(module)
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


def _inside_out(module: Module, met: set[int]) -> Iterator[Module]:
    """Yield all modules within one, and then that one, each once."""
    met.add(id(module))
    for child in module.children():
        if id(child) not in met:
            yield from _inside_out(child, met)
    yield module


def _target_of(device: Any, dtype: Any) -> tuple[ModuleType | None, np.dtype[Any] | None]:
    """Return the library and the type that the arguments of `Module.to` mean; None stands for no change."""
    if device is None and dtype is None:
        raise TypeError("expected a device, a type or both (got neither)")
    if device is None or dtype is not None or (isinstance(device, str) and device in ("cpu", "cuda")):
        xp = None if device is None else array_module(device)
        return xp, None if dtype is None else data_type(dtype)
    try:
        return None, data_type(device)
    except TypeError:
        if not isinstance(device, str):
            raise
    raise ValueError(
        "expected device 'cpu' or 'cuda', or a type: 'float16', 'bfloat16', 'float32', 'float64' "
        f"(got {device!r})"
    )


@np.errstate(all="ignore")  # values that exceed a type become infinite, as in a forward
def _converted(array: Array, xp: ModuleType | None, dtype: np.dtype[Any] | None) -> Array:
    """Return an array of a library, and of a type if it has floating-point numbers."""
    xp = xp or module_of(array)
    if dtype is None or array.dtype == dtype or not (is_data_type(array.dtype) or array.dtype.kind == "f"):
        return move(array, xp)
    return move(move(array, np).astype(dtype), xp)  # on the host: CuPy does not convert to all types


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


def _buffer_after(name: str, buffer: Any, value: Any) -> Any:
    """Return a buffer after an assignment to it: the same with other values, if there is one."""
    if isinstance(value, Parameter | Module):
        raise TypeError(
            f"expected the buffer {name} to be an array or None (got a {type(value).__name__}): "
            "use its .data, or another name"
        )
    array = as_buffer(name, value)
    if buffer is None:
        return array
    assign(name, buffer, array)
    return buffer


def _parameter_after(name: str, parameter: Any, value: Any) -> Any:
    """Return a parameter after an assignment to it: the same with other values, if given an array."""
    if isinstance(value, Parameter | Module):
        return value
    array = as_array(value)
    if not isinstance(parameter, Parameter):
        raise TypeError(
            f"expected {name} to be a Parameter or None (got {type_name(value)}): use Parameter(array)"
        )
    if not is_array(array) or not is_array(parameter.data):
        raise TypeError(
            f"expected {name} to be an array, a Parameter or None (got {type_name(value)}): "
            f"change its values by .{name}.data[...] = value, or assign an array to .{name}.data"
        )
    assign(name, parameter.data, array)
    return parameter
