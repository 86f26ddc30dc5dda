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
        self.root_nodes: list[tuple[str, Any]] = []
        """Dotted name and node, of those that are within no other node, by each of their names."""
        self.named_leaves: list[tuple[str, Any]] = []
        """Dotted name and leaf, each once."""
        self._root: _Seen | None = None
        self._seen: list[_Seen] = []
        """The values seen in all other nodes, and in the containers that hold nodes or leaves."""
        if kinds is not None:
            self._walk(root, kinds)
        self.leaves = [leaf for _, leaf in self.named_leaves]

    def _walk(self, root: Any, kinds: Kinds) -> None:
        pending: list[tuple[str, Any]] = [("", root)]
        met: set[int] = set()
        named: dict[str, Any] = {}
        while pending:
            prefix, node = pending.pop()
            if id(node) in met:
                continue
            met.add(id(node))
            own, nodes = [], []
            for name, value in self._members(node, kinds):
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
            attributes = _Seen.of(vars(node), kinds)
            if node is root:
                self.root_leaves, self._root = own, attributes._replace(values=None)
                self.root_nodes = [each for each in nodes if each[1] is not root]
            else:
                self.within.append((prefix, node, own))
                self._seen.append(attributes)

    def _members(self, node: Any, kinds: Kinds) -> Iterator[tuple[str, Any]]:
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
        self._seen += [_Seen.of(each, kinds) for each in containers if has_members(each, kinds)]

    def is_current(self, root: Any) -> bool:
        """Tell whether nothing within has changed: a comparison, without a walk."""
        if self._root is None or not self._root.is_same(vars(root)):
            return False
        return all(seen.is_same(seen.values) for seen in self._seen)

    def __reduce__(self) -> Any:
        """Let a copy see for itself."""
        return Tree, ()


class _Seen(NamedTuple):
    """The values that a node has as attributes, or a container as items, to be compared later.

    Kept are nodes, leaves and the containers that hold some. Of all others, which may be large arrays or
    hold some, there are only the types: a comparison must not keep them alive.
    """

    values: Any
    """A dict, list or tuple; None for the attributes of the root."""
    types: list[type]
    held: list[tuple[Any, Any]]
    """(key, value) of those kept."""
    plain: list[tuple[Any, Any]]
    """(key, form) of other containers."""

    @classmethod
    def of(cls, values: Any, kinds: Kinds) -> _Seen:
        seen = cls(values, [], [], [])
        for key, value in items_of(values):
            seen.types.append(type(value))
            if has_members(value, kinds):
                seen.held.append((key, value))
            elif isinstance(value, _CONTAINERS):
                seen.plain.append((key, _form(value)))
        return seen

    def is_same(self, values: Any) -> bool:
        if list(map(type, values.values() if isinstance(values, dict) else values)) != self.types:
            return False
        try:
            for key, value in self.held:
                if values[key] is not value:
                    return False
            return not self.plain or all(_form(values[key]) == form for key, form in self.plain)
        except KeyError:
            return False


_CONTAINERS = (list, tuple, dict)


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
