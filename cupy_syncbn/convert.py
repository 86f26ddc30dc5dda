"""Turning the batch normalizations within a model into synchronized ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from cupy_syncbn.comm.groups import ProcessGroup, as_group
from cupy_syncbn.layers import Parameter, SyncBatchNorm, _BatchNorm

if TYPE_CHECKING:
    from mpi4py import MPI

_Assign = Callable[[Any, Any, Any], None]

# Objects that hold no layers, or not as their own.
_OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, Parameter, ProcessGroup)


def convert_sync_batchnorm(module: Any, process_group: ProcessGroup | MPI.Intracomm | None = None) -> Any:
    """Turn all BatchNorm layers within an object into SyncBatchNorm layers.

    Parameters
    ----------
    module : object
        A layer, a Module, or any object that holds layers, directly or within further objects. Looked into
        are the items of lists, tuples, dicts and of their subclasses, and all attributes of objects, but no
        other collections, closures, classes or Python modules.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all. SyncBatchNorm layers keep their group if it is None.

    Returns
    -------
    object
        The converted layer, if `module` is one; else `module`, changed in place, or a copy if it is a tuple
        of layers.
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
        self.replaced: dict[int, tuple[Any, Any]] = {}
        self.visited: dict[int, object] = {}

    def converted(self, root: Any) -> Any:
        result = self._replacement(root)
        assignments: list[tuple[_Assign, Any, Any, Any]] = []
        pending = [result]
        while pending:
            holder = pending.pop()
            if id(holder) in self.visited:
                continue
            self.visited[id(holder)] = holder
            for assign, part, key, value in _held(holder):
                new = self._replacement(value)
                if new is not value:
                    assignments.append((assign, part, key, new))
                pending.append(new)
        for assign, part, key, new in assignments:  # nothing has failed on the way
            assign(part, key, new)
        return result

    def _replacement(self, value: Any) -> Any:
        """Return the new layer for an old one, a new tuple for one that has any, anything else as it is."""
        if not isinstance(value, _BatchNorm | tuple):
            return value
        if id(value) not in self.replaced:
            new = self._tuple(value) if isinstance(value, tuple) else self._layer(value)
            self.replaced[id(value)] = value, new
            self.replaced[id(new)] = new, new
        return self.replaced[id(value)][1]

    def _tuple(self, old: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self._replacement(item) for item in old]
        if all(new is item for new, item in zip(items, old, strict=True)):
            return old
        new = tuple.__new__(type(old), items)  # what a subclass's own asks for is its own matter
        getattr(new, "__dict__", {}).update(getattr(old, "__dict__", {}))
        return new

    def _layer(self, old: _BatchNorm) -> SyncBatchNorm:
        if isinstance(old, SyncBatchNorm) and self.group is None:
            return old
        new = SyncBatchNorm.__new__(SyncBatchNorm)
        state = _BatchNorm.__getstate__(old)  # a pair where a subclass has slots, which `new` has not
        vars(new).update(state[0] if isinstance(state, tuple) else state)
        new.process_group = self.group
        return new


def _held(holder: Any) -> Iterator[tuple[_Assign, Any, Any, Any]]:
    """Yield (what assigns, to what, key or attribute, value) of what an object holds."""
    if isinstance(holder, _OPAQUE):
        return
    if isinstance(holder, dict | list | tuple):
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        yield from ((operator.setitem, holder, key, value) for key, value in items)
    for cls in type(holder).__mro__:
        # Not the names in __slots__: Python mangles private ones.
        for name, member in vars(cls).items() if "__slots__" in vars(cls) else ():
            if isinstance(member, MemberDescriptorType) and hasattr(holder, name):
                yield object.__setattr__, holder, name, getattr(holder, name)  # of frozen dataclasses too
    attributes = getattr(holder, "__dict__", {})
    for name, value in attributes.items():  # which a property may hide
        yield operator.setitem, attributes, name, value
