"""All that is within a module: walked once, and again when something has changed there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
        self.named_leaves: list[tuple[str, Any]] = []
        """Dotted name and leaf, each once."""
        self._root: _Seen | None = None
        self._nodes: list[_Seen] = []
        self._containers: list[_Seen] = []
        if kinds is not None:
            self._walk(root, kinds)
        self.leaves = [leaf for _, leaf in self.named_leaves]

    def _walk(self, root: Any, kinds: Kinds) -> None:
        held = (kinds.node, kinds.leaf, list, tuple, dict)
        pending: list[tuple[str, Any]] = [("", root)]
        met: set[int] = set()
        while pending:
            prefix, node = pending.pop()
            if id(node) in met:
                continue
            met.add(id(node))
            own, nodes = [], []
            for name, value in self._members(node, kinds, held):
                dotted = join(prefix, name)
                if isinstance(value, kinds.node):
                    nodes.append((dotted, value))
                    continue
                own.append(value)
                if id(value) not in met:
                    met.add(id(value))
                    self.named_leaves.append((dotted, value))
            pending += nodes[::-1]
            attributes = _Seen.of(vars(node), held)
            if node is root:
                self.root_leaves, self._root = own, attributes._replace(values=None)
            else:
                self.within.append((prefix, node, own))
                self._nodes.append(attributes)

    def _members(self, node: Any, kinds: Kinds, held: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
        """Yield the leaves and nodes of a node that are not within another one."""
        containers: list[Any] = [value for value in vars(node).values() if isinstance(value, list | dict)]
        pending = list(kinds.members(node))[::-1]
        met: set[int] = set()
        while pending:
            name, value = pending.pop()
            if isinstance(value, kinds.node | kinds.leaf):
                yield name, value
            elif isinstance(value, list | tuple | dict) and id(value) not in met:
                met.add(id(value))
                containers.append(value)
                pending += [(f"{name}.{key}", item) for key, item in items_of(value)][::-1]
        self._containers += [_Seen.of(each, held) for each in containers if not isinstance(each, tuple)]

    def is_current(self, root: Any) -> bool:
        """Tell whether everything within holds what it did: a comparison, without a walk."""
        if self._root is None or not self._root.is_same(vars(root)):
            return False
        for attributes, types, held in self._nodes:  # as _Seen.is_same, without a call for each
            if list(map(type, attributes.values())) != types:
                return False
            for name, value in held:
                if attributes.get(name) is not value:
                    return False
        return all(seen.is_same(seen.values) for seen in self._containers)

    def __reduce__(self) -> Any:
        """Let a copy see for itself."""
        return Tree, ()


class _Seen(NamedTuple):
    """The values of a node's attributes, or of a list or dict: their types, and those that matter.

    The others may be large arrays, which a later comparison must not keep alive.
    """

    values: Any
    """A dict or list; None for the attributes of the root."""
    types: list[type]
    held: list[tuple[Any, Any]]
    """(key, value) of nodes, leaves and containers."""

    @classmethod
    def of(cls, values: dict[Any, Any] | list[Any], held: tuple[type, ...]) -> _Seen:
        items = list(items_of(values))
        types = [type(value) for _, value in items]
        return cls(values, types, [(key, value) for key, value in items if isinstance(value, held)])

    def is_same(self, values: Any) -> bool:
        if list(map(type, values.values() if isinstance(values, dict) else values)) != self.types:
            return False
        try:
            return all(values[key] is value for key, value in self.held)
        except KeyError:
            return False


def items_of(container: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Return the keys or indices of a container, with their values."""
    return container.items() if isinstance(container, dict) else enumerate(container)


def join(prefix: str, name: str) -> str:
    """Return the dotted name of something within what has a dotted name."""
    return f"{prefix}.{name}" if prefix else name
