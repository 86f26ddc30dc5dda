"""Turning the batch normalizations within a model into synchronized ones."""

from __future__ import annotations

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from cupy_syncbn.layers import Parameter, SyncBatchNorm, _BatchNorm
from cupy_syncbn.process_group import ProcessGroup, as_group

if TYPE_CHECKING:
    from mpi4py import MPI

# Objects that hold no layers, or not as their own.
_OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, Parameter, ProcessGroup)


def convert_sync_batchnorm(module: Any, process_group: ProcessGroup | MPI.Intracomm | None = None) -> Any:
    """Turn all BatchNorm layers within an object into SyncBatchNorm layers.

    Parameters
    ----------
    module : object
        A layer, a Module, or any object whose attributes, lists, tuples and dicts hold layers, directly
        or within further such objects.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all. SyncBatchNorm layers keep their group if it is None.

    Returns
    -------
    object
        The converted layer, if `module` is one; else `module`, changed in place, or a copy if it is a tuple.
        New layers share the parameter and buffer objects of the old, and take over their settings,
        training mode among them. A layer found in several places is one layer afterwards too.

    Raises
    ------
    TypeError
        If `process_group` is not a group.

    Examples
    --------
    >>> from cupy_syncbn import BatchNorm2d
    >>> net = {"stem": BatchNorm2d(8), "blocks": [BatchNorm2d(16), "relu"]}
    >>> weight = net["stem"].weight
    >>> net = convert_sync_batchnorm(net)
    >>> type(net["stem"]).__name__, net["stem"].weight is weight
    ('SyncBatchNorm', True)
    """
    group = None if process_group is None else as_group(process_group)
    return _Conversion(group).converted(module)


class _Conversion:
    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        # Both hold on to what they name by id, which another object could have otherwise.
        self.layers: dict[int, tuple[_BatchNorm, SyncBatchNorm]] = {}
        self.visited: dict[int, object] = {}

    def converted(self, root: Any) -> Any:
        result = self._replacement(root)
        pending = [result]
        while pending:
            holder = pending.pop()
            if id(holder) in self.visited:
                continue
            self.visited[id(holder)] = holder
            for key, value in list(_items(holder)):
                new = self._replacement(value)
                if new is not value:
                    _assign(holder, key, new)
                pending.append(new)
        return result

    def _replacement(self, value: Any) -> Any:
        """Return the new layer for an old one, a new tuple for one that has any, anything else as it is."""
        if isinstance(value, _BatchNorm):
            return self._layer(value)
        if isinstance(value, tuple):
            items = [self._replacement(item) for item in value]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                make = getattr(value, "_make", type(value))  # a NamedTuple is not called with one sequence
                return make(items)
        return value

    def _layer(self, old: _BatchNorm) -> SyncBatchNorm:
        if isinstance(old, SyncBatchNorm) and self.group is None:
            return old
        if id(old) not in self.layers:
            new = SyncBatchNorm.__new__(SyncBatchNorm)
            state = _BatchNorm.__getstate__(old)  # a pair where a subclass has slots, which `new` has not
            vars(new).update(state[0] if isinstance(state, tuple) else state)
            new.process_group = self.group
            self.layers[id(old)] = old, new
            self.layers[id(new)] = old, new
        return self.layers[id(old)][1]


def _items(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (key or attribute, value) of what an object holds."""
    if isinstance(holder, dict):
        yield from holder.items()
    elif isinstance(holder, list | tuple):
        yield from enumerate(holder)
    elif not isinstance(holder, _OPAQUE):
        yield from getattr(holder, "__dict__", {}).items()
        for cls in type(holder).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(holder, name):
                    yield name, getattr(holder, name)


def _assign(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict | list):
        holder[key] = value
    else:
        object.__setattr__(holder, key, value)  # frozen dataclasses too
