"""Finding and replacing objects wherever another object holds them: as an item, an attribute or a slot."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType, NoneType
from typing import Any, NamedTuple

_Assign = Callable[[Any, Any, Any], None]

_NO_HOLDERS = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
_ATOMS = frozenset({NoneType, bool, int, float, complex, str, bytes})


class Held(NamedTuple):
    """An object within another one."""

    value: Any
    key: Any = None
    """The name of the attribute, or the key or index of the item."""
    holder: Held | None = None
    """None for the root."""

    @property
    def path(self) -> list[Held]:
        """The objects that lead here from the root, which is not in it, and this one."""
        path, each = [], self
        while each.holder is not None:
            path.append(each)
            each = each.holder
        return path[::-1]

    @property
    def name(self) -> str:
        """The dotted name within the root."""
        return ".".join(str(each.key) for each in self.path)


def held_within(root: Any, opaque: tuple[type, ...]) -> Iterator[Held]:
    """Yield `root` and all objects within it, each once, except what is within instances of `opaque`."""
    pending = [Held(root)]
    visited: dict[int, object] = {}  # holds on to the objects: another could get the id otherwise
    while pending:
        found = pending.pop()
        if id(found.value) in visited:
            continue
        visited[id(found.value)] = found.value
        yield found
        pending += [
            Held(value, key, found)
            for _, _, key, value in reversed(list(_held(found.value, opaque)))
            if type(value) not in _ATOMS
        ]


def can_hold(value: Any, opaque: tuple[type, ...]) -> bool:
    """Tell whether an object may hold others, where these functions look."""
    if isinstance(value, (*_NO_HOLDERS, *opaque)):
        return False
    has_slots = any("__slots__" in vars(cls) for cls in type(value).__mro__)
    return has_slots or hasattr(value, "__dict__") or isinstance(value, dict | list | tuple)


def replace_within(root: Any, replacement: Callable[[Any], Any], opaque: tuple[type, ...]) -> Any:
    """Replace objects in the items, attributes and slots of `root`, and of all that these hold.

    `replacement` returns the new object, or its argument where that stays. It is asked once for each object,
    so that one found in several places is one afterwards too. Tuples are made anew, all other holders are
    changed in place, and only when nothing has failed on the way. Instances of `opaque` are not looked into.
    """
    return _Replacing(replacement, opaque).within(root)


class _Replacing:
    def __init__(self, replacement: Callable[[Any], Any], opaque: tuple[type, ...]) -> None:
        self.replacement, self.opaque = replacement, opaque
        # Both hold on to the objects they name by id: another object could get the id otherwise.
        self.replaced: dict[int, tuple[Any, Any]] = {}
        self.visited: dict[int, object] = {}

    def within(self, root: Any) -> Any:
        result = self._new(root)
        assignments: list[tuple[_Assign, Any, Any, Any]] = []
        pending = [result]
        while pending:
            holder = pending.pop()
            if id(holder) in self.visited:
                continue
            self.visited[id(holder)] = holder
            for assign, part, key, value in _held(holder, self.opaque):
                new = self._new(value)
                if new is not value:
                    assignments.append((assign, part, key, new))
                pending.append(new)
        for assign, part, key, new in assignments:  # nothing has failed on the way
            assign(part, key, new)
        return result

    def _new(self, value: Any) -> Any:
        if id(value) in self.replaced:
            return self.replaced[id(value)][1]
        new = self._tuple(value) if isinstance(value, tuple) else self.replacement(value)
        if new is not value or isinstance(value, tuple):
            self.replaced[id(value)] = value, new
            self.replaced[id(new)] = new, new
        return new

    def _tuple(self, old: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self._new(item) for item in old]
        if all(new is item for new, item in zip(items, old, strict=True)):
            return old
        new = tuple.__new__(type(old), items)  # not a subclass's own __new__, whose arguments are unknown
        getattr(new, "__dict__", {}).update(getattr(old, "__dict__", {}))
        return new


def _held(holder: Any, opaque: tuple[type, ...]) -> Iterator[tuple[_Assign, Any, Any, Any]]:
    """Yield (assigning function, its target, key or attribute, value) of all that an object holds."""
    if type(holder) in _ATOMS or isinstance(holder, (*_NO_HOLDERS, *opaque)):
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
