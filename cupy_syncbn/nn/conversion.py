"""Checks of objects that hold layers: what they are, what a conversion loses, which layers a Module sees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from cupy_syncbn.arrays import type_name
from cupy_syncbn.comm.groups import ProcessGroup
from cupy_syncbn.nn.module import Module
from cupy_syncbn.nn.parameter import Parameter
from cupy_syncbn.nn.replace import Held, can_hold, held_within
from cupy_syncbn.nn.tree import Tree

OPAQUE = (Parameter, ProcessGroup, Tree)
"""The types of objects that hold no layers."""


def layers_within(root: Any, kind: type[Module]) -> list[Any]:
    """Return the layers of a kind within an object; TypeError if it can hold none, or holds torch's."""
    if not can_hold(root, OPAQUE):
        got = f"the class {root.__qualname__}" if isinstance(root, type) else type_name(root)
        raise TypeError(
            "expected a layer, a Module, or an object that holds layers as attributes or in lists, tuples "
            f"and dicts (got {got}): call it with the object that your layers are in"
        )
    found = list(held_within(root, OPAQUE))
    layers = [each.value for each in found if isinstance(each.value, kind)]
    nn = sys.modules.get("torch.nn")
    if hasattr(nn, "SyncBatchNorm"):  # it is imported, and to its end
        _check_torch(nn, found, bool(layers))
    return layers


def _check_torch(nn: Any, found: list[Held], has_layers: bool) -> None:
    """Raise TypeError for a module of torch, and for one that holds batch normalizations of torch."""
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    theirs = next((each for each in found if isinstance(each.value, kinds)), None)
    if theirs is None and isinstance(found[0].value, nn.Module) and not has_layers:
        theirs = found[0]
    if theirs is not None:
        where = f" at {theirs.name.replace('_modules.', '')}" if theirs.holder else ""
        raise TypeError(
            f"expected layers of cupy_syncbn (got {type_name(theirs.value)}{where}): torch's are converted "
            "by cupy_syncbn.interop.torch.convert_sync_batchnorm"
        )


def nothing_found(root: Any) -> str:
    """Return the warning of an object without layers."""
    return (
        f"convert_sync_batchnorm found no BatchNorm layer of cupy_syncbn in {type_name(root)}, where it "
        "looked at attributes, lists, tuples and dicts: keep layers there, or convert each layer by itself"
    )


def losses(layers: Iterable[Any], target: type, *ours: type) -> list[str]:
    """Return the warnings of layers with something of their own that their conversion to `target` loses.

    Instances of `target` keep their type. The other classes, `ours`, have nothing that it lacks.
    """
    warnings: dict[Any, str] = {}
    known = {each for kind in (target, *ours) for each in kind.__mro__}
    for layer in layers:
        kind = type(layer)
        lost = [] if isinstance(layer, target) else _own_names(kind, known)
        if lost:
            warnings[kind] = (
                f"{kind.__qualname__} becomes {target.__name__}, and loses what it has of its own: "
                f"{', '.join(lost)}. Derive it from {target.__name__}, whose subclasses stay what they are, "
                "or put that into a Module which holds the layer"
            )
        patched = [name for name in vars(layer) if callable(getattr(target, name, None))]
        if patched:
            warnings[kind, *patched] = (
                f"{kind.__qualname__} has its own {', '.join(patched)} as an attribute, which may call the "
                "layer as it was before the conversion: set it afterwards, or put that into a Module which "
                "holds the layer"
            )
    return list(warnings.values())


def _own_names(kind: type, ours: set[type]) -> list[str]:
    """Return the names that a class has beside those of `ours`, without special ones but __call__."""
    own = [each for each in kind.__mro__ if each not in ours and each.__module__ not in ("abc", "typing")]
    names = {name for each in own for name in vars(each)}
    return [name for name in sorted(names) if name == "__call__" or not name.startswith(("__", "_abc_"))]


def check_reach(root: Any, is_wanted: Callable[[Any], bool]) -> None:
    """Raise TypeError if a module, `root` or one within it, holds a layer that it does not see."""
    seen: set[int] = set()
    for outer in held_within(root, OPAQUE):
        if not isinstance(outer.value, Module) or id(outer.value) in seen:
            continue
        inner = {id(module) for _, module in outer.value.named_modules()}
        seen |= inner
        for found in held_within(outer.value, OPAQUE):
            if is_wanted(found.value) and id(found.value) not in inner:
                raise TypeError(_unseen(outer.value, found))


def _unseen(module: Module, found: Held) -> str:
    """Return which layer a module does not see, and what to do about it."""
    holders = [module, *(each.value for each in found.path[:-1])]
    wall = next((each for each in holders if not isinstance(each, Module | list | tuple | dict)), None)
    if wall is None:  # a slot, or an attribute of a list
        reason = f"{type(holders[-1]).__name__} shows no layers there: keep it"
    else:
        name = type(wall).__name__
        reason = f"{name} is no Module: make it one, class {name}(Module), or keep the layer"
    return (
        f"{type(module).__name__} does not see its layer {found.name} "
        f"({type(found.value).__name__}) in parameters(), state_dict(), train() and eval(), as {reason} as "
        "an attribute of a Module, or in a list, tuple or dict there"
    )
