"""All that is within a module: walked once, and again when something has changed there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, repeat
from operator import eq, getitem, is_, methodcaller
from typing import Any, NamedTuple


class Kinds(NamedTuple):
    """The types that a tree consists of, and where a node's own members are."""

    node: type
    leaf: type
    members: Callable[[Any], Iterable[tuple[str, Any]]]
    """Yields (name, value) of a node."""


class Tree:
    """The nodes and leaves within a root, found through attributes, lists, tuples and dicts.

    It does not refer to the root, which refers to it: both go with the last other reference.
    """

    def __init__(self, root: Any = None, kinds: Kinds | None = None) -> None:
        self.within: list[tuple[str, Any, list[Any]]] = []
        """Dotted name, node and its own leaves, of all nodes but the root, each once."""
        self.root_leaves: list[Any] = []
        self.root_nodes: list[tuple[str, Any]] = []
        """Dotted name and node, of those that are within no other node, by each of their names."""
        self.named_leaves: list[tuple[str, Any]] = []
        """Dotted name and leaf, each once."""
        self._seen: _Seen | None = None
        """The attributes of all nodes, and the items of the containers that hold nodes or leaves."""
        if kinds is not None:
            self._seen = _Seen(root, kinds)
            self._walk(root, kinds, self._seen)
            self._seen.complete(vars(root))
        self.leaves = [leaf for _, leaf in self.named_leaves]

    def _walk(self, root: Any, kinds: Kinds, seen: _Seen) -> None:
        pending: list[tuple[str, Any]] = [("", root)]
        met: set[int] = set()
        named: dict[str, Any] = {}
        while pending:
            prefix, node = pending.pop()
            if id(node) in met:
                continue
            met.add(id(node))
            own, nodes = [], []
            for name, value in self._members(node, kinds, seen):
                dotted = join(prefix, name)
                if named.setdefault(dotted, value) is not value:
                    raise two_of_one_name(dotted)
                if isinstance(value, kinds.node):
                    nodes.append((dotted, value))
                    continue
                own.append(value)
                if id(value) not in met:
                    met.add(id(value))
                    self.named_leaves.append((dotted, value))
            pending += nodes[::-1]
            if node is root:
                self.root_leaves = own
                self.root_nodes = [each for each in nodes if each[1] is not root]
            else:
                self.within.append((prefix, node, own))
                seen.add(vars(node))

    def _members(self, node: Any, kinds: Kinds, seen: _Seen) -> Iterator[tuple[str, Any]]:
        """Yield the leaves and nodes of a node that are not within another one."""
        containers = [value for value in vars(node).values() if isinstance(value, _CONTAINERS)]
        pending = list(kinds.members(node))[::-1]
        met: set[int] = set()
        while pending:
            name, value = pending.pop()
            if isinstance(value, kinds.node | kinds.leaf):
                yield name, value
            elif isinstance(value, _CONTAINERS) and id(value) not in met:
                met.add(id(value))
                containers.append(value)
                pending += [(f"{name}.{key}", item) for key, item in items_of(value)][::-1]
        for each in containers:
            if has_members(each, kinds):
                seen.add(each)

    def is_current(self, root: Any) -> bool:
        """Tell whether nothing within has changed: a comparison, without a walk."""
        return self._seen is not None and self._seen.is_same(vars(root))

    def __reduce__(self) -> Any:
        """Let a copy see for itself."""
        return Tree, ()


class _Seen:
    """The values that nodes have as attributes, and containers as items, to be compared later.

    Kept are nodes, leaves and the containers that hold some. Of all others, which may be large arrays or
    hold some, there are only the types: a comparison must not keep them alive. Nor are the attributes of the
    root kept, which come first.

    Values of one sort stand in one list, so that a comparison is a few calls of functions written in C.
    """

    def __init__(self, root: Any, kinds: Kinds) -> None:
        self._kinds = kinds
        self._dicts: list[dict[Any, Any]] = []
        self._sequences: list[list[Any] | tuple[Any, ...]] = []
        self._held, self._flat, self._nested = _Places(), _Places(), _Places()
        self._forms: list[Any] = []
        """Of those that `_nested` are."""
        self._look(None, vars(root))

    def add(self, values: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> None:
        if isinstance(values, dict):
            self._dicts.append(values)
        else:
            self._sequences.append(values)
        self._look(values, values)

    def _look(self, owner: Any, values: Any) -> None:
        for key, value in items_of(values):
            if has_members(value, self._kinds):
                self._held.add(owner, key)
            elif isinstance(value, _CONTAINERS):
                form = _form(value)
                is_flat = not isinstance(value, dict) and form == (type(value), list(map(type, value)))
                if is_flat:
                    self._flat.add(owner, key)
                else:
                    self._nested.add(owner, key)
                    self._forms.append(form)

    def complete(self, own: dict[str, Any]) -> None:
        """Keep what a comparison has to find again; `own` are the attributes of the root."""
        self._values = list(self._held.values(own))
        self._all_types = self._types(own)
        self._flat_types = _types_in(self._flat.values(own))

    def _types(self, own: dict[str, Any]) -> tuple[list[int], list[type]]:
        return _types_in([*map(_VALUES, [own, *self._dicts]), *self._sequences])

    def is_same(self, own: dict[str, Any]) -> bool:
        try:
            return (
                self._types(own) == self._all_types
                and all(map(is_, self._held.values(own), self._values))
                and _types_in(self._flat.values(own)) == self._flat_types
                and all(map(eq, map(_form, self._nested.values(own)), self._forms))
            )
        except KeyError:
            return False


class _Places:
    """Where some values are: in a container or among a node's attributes, under a key."""

    def __init__(self) -> None:
        self._owners: list[Any] = []
        self._keys: list[Any] = []
        self._of_root = 0

    def add(self, owner: Any, key: Any) -> None:
        """Add one; None stands for the attributes of the root, which come before all others."""
        self._keys.append(key)
        if owner is None:
            self._of_root += 1
        else:
            self._owners.append(owner)

    def values(self, own: dict[str, Any]) -> Iterator[Any]:
        """Return what is there; `own` are the attributes of the root."""
        return map(getitem, chain(repeat(own, self._of_root), self._owners), self._keys)


def _types_in(containers: Iterable[Collection[Any]]) -> tuple[list[int], list[type]]:
    """Return the lengths of containers, and the types of all that they hold."""
    containers = list(containers)
    return list(map(len, containers)), list(map(type, chain.from_iterable(containers)))


_CONTAINERS = (list, tuple, dict)
_VALUES = methodcaller("values")


def has_members(value: Any, kinds: Kinds, within: tuple[int, ...] = ()) -> bool:
    """Tell whether a value is a node or leaf, or a container that holds one."""
    if not isinstance(value, _CONTAINERS):
        return isinstance(value, kinds.node | kinds.leaf)
    within = (*within, id(value))
    return any(has_members(item, kinds, within) for _, item in items_of(value) if id(item) not in within)


def _form(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Return the type of a value, and of all that it holds if it is a container."""
    if not isinstance(value, _CONTAINERS) or id(value) in within:
        return type(value)
    within = (*within, id(value))
    return type(value), [_form(item, within) for _, item in items_of(value)]


def items_of(container: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Return the keys or indices of a container, with their values."""
    return container.items() if isinstance(container, dict) else enumerate(container)


def join(prefix: str, name: str) -> str:
    """Return the dotted name of a member of something that has a dotted name."""
    return f"{prefix}.{name}" if prefix else name


def two_of_one_name(name: str) -> ValueError:
    """Return the error that tells of two members with one dotted name."""
    return ValueError(
        f"expected one member by each name (got two by {name!r}): use other keys, of which no two are the "
        "same text, nor have dots"
    )
